"""Which 4-bit weights stay dequantized, when a plan has so many bytes for them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..kept_weights import Place, place_of


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
