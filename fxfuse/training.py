"""Training a causal language model a few steps, measured: losses, seconds, bytes kept for the backward."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

# The dtype in which a run counts as exact beside one in the key's dtype.
TWICE = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}


@dataclass
class Run:
    """What one training run gave."""

    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    saved_bytes: int = 0  # between forward and backward of the last step, without parameters and inputs

    @property
    def first_step(self) -> float:
        """Seconds of the first step, which is the one that compiles."""
        return self.seconds[0]

    @property
    def step(self) -> float:
        """Median seconds of the steps after the first two."""
        return statistics.median(self.seconds[2:] or self.seconds)


def train(
    model: torch.nn.Module,
    batches: Iterable[torch.Tensor],
    learning_rate: float,
    each_step: Callable[[], None] = lambda: None,
) -> Run:
    """Train by AdamW on the model's own causal loss."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    model.train()
    run = Run()
    for batch in batches:
        ids = batch.to(device)
        started = _now(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        run.gradient_norms.append(gradient_norm(model))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.losses.append(loss.item())
        run.seconds.append(_now(device) - started)
        each_step()
    run.saved_bytes = saved_for_backward(model, ids)
    return run


def gradient_norm(model: torch.nn.Module) -> float:
    """The Euclidean norm of all gradients together, in float64."""
    squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
    return torch.stack(squares).sum().sqrt().item()


def saved_for_backward(model: torch.nn.Module, ids: torch.Tensor) -> int:
    """Bytes that autograd keeps between one forward and its backward, each storage once.

    Parameters, buffers and the input live anyway and do not count.
    """
    lives = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), ids)}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in lives:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    model.zero_grad(set_to_none=True)
    return sum(kept.values())


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
