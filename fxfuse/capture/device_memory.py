"""What is allocated on a device when a training step begins, and for what."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook


@dataclass
class Readings:
    """Bytes on one device. ``allocated`` and ``peak`` (since it was last reset) are of the whole process; 0 where nobody counts."""

    allocated: int = 0
    peak: int = 0
    weights: int = 0  # parameters and buffers of the model, and what they carry with them
    gradients: int = 0
    optimizer: int = 0  # state of optimizers that have stepped on the model's weights


WIDE_TENSORS = 8
_optimizers: WeakSet[Optimizer] = WeakSet()
_watching: list[Any] = []


def watch_optimizers() -> None:
    """Remember every optimizer that steps, from now on. Idempotent."""
    if not _watching:
        _watching.append(register_optimizer_step_post_hook(lambda optimizer, args, kwargs: _optimizers.add(optimizer)))


def read(model: nn.Module, device: torch.device) -> Readings:
    """The present state."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.device == device]
    gradients = [p.grad for p in model.parameters() if p.grad is not None and p.grad.device == device]
    cuda = device.type == "cuda"
    return Readings(
        allocated=torch.cuda.memory_allocated(device) if cuda else 0,
        peak=torch.cuda.max_memory_allocated(device) if cuda else 0,
        weights=_bytes(tensors),
        gradients=_bytes(gradients),
        optimizer=optimizer_state_bytes(model, device),
    )


def optimizer_state_bytes(model: nn.Module, device: torch.device) -> int:
    """State that optimizers keep on the device for the model's parameters."""
    own = {id(p) for p in model.parameters()}
    return _bytes([
        value
        for optimizer in _optimizers
        for parameter, state in optimizer.state.items()
        if id(parameter) in own
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.device == device
    ])


def wide_bytes(tokens: int, modules: Iterable[nn.Module]) -> int:
    """About how much the widest part of a block needs with its gradient, before anything is known of it: so many tensors of 16 bits
    that are as wide as the largest matrix of weights."""
    widest = 1
    for parameter in (p for module in modules for p in module.parameters()):
        shape = getattr(getattr(parameter, "quant_state", None), "shape", None) or parameter.shape
        widest = max(widest, *shape) if len(shape) == 2 else widest
    return WIDE_TENSORS * 2 * tokens * widest


def _bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of the memory that tensors lie in, each memory once; of a sharded tensor, its shard here."""
    storages = {}
    for tensor in tensors:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        storage = local.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
