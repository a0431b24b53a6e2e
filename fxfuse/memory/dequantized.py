"""Which 4-bit weights stay dequantized, when a plan has so many bytes for them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..kept_weights import Keeper, Place, place_of
from .plan import MemoryPlan
from .planner import Problem

_LOOKS = 16  # steps: to go through the parameters of a model takes milliseconds


class Dequantized:
    """The weights of some modules on a device that stay dequantized, as their plan says."""

    def __init__(self, modules: Sequence[nn.Module], device: torch.device) -> None:
        self._modules, self._device = modules, device
        self._keeper = Keeper()
        self._steps = 0

    @property
    def bytes(self) -> int:
        """What they take now."""
        return self._keeper.bytes

    def follow(self, plan: MemoryPlan, problem: Problem) -> None:
        """Keep as many as the plan has room for from now on."""
        whole = sum(len(group.places) * group.block.dequantized_bytes for group in problem.groups)
        packed = packed_weights(self._modules, self._device) if plan.kept_weights else {}
        self._keeper.keep(chosen(packed, plan.kept_weights, whole))

    def prune(self) -> None:
        """Let go of weights that the modules have no more; called for each step, it looks now and then."""
        self._steps += 1
        if self._keeper.places and self._steps % _LOOKS == 0:
            self._keeper.prune(packed_weights(self._modules, self._device))

    def drop(self) -> None:
        """Keep none."""
        self._keeper.drop()


def packed_weights(modules: Iterable[nn.Module], device: torch.device) -> dict[Place, int]:
    """Where the frozen 4-bit weights of modules lie on a device, and how many numbers each holds, in their order.

    Weights in shards are left out, which are gathered anew for each use: their memory is that of others as well.
    """
    found = {}
    for module in modules:
        for parameter in module.parameters():
            shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
            if shape and parameter.device == device and not parameter.requires_grad and _is_whole(parameter):
                found[place_of(parameter)] = math.prod(shape)
    return found


def _is_whole(tensor: Tensor) -> bool:
    """Has a tensor memory of its own."""
    return not hasattr(tensor, "to_local") and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def chosen(weights: dict[Place, int], planned: int, whole: int) -> dict[Place, int]:
    """The first of the weights whose bytes fit in ``planned`` of the ``whole`` that all take dequantized."""
    each = whole / max(sum(weights.values()), 1)  # bytes a number
    found: dict[Place, int] = {}
    for place, count in weights.items():
        size = math.ceil(count * each)
        if size <= planned:
            found[place] = size
            planned -= size
    return found
