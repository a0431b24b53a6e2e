"""Thin products of a graph, compiled before they are first timed: the configurations that ``thin_choice`` will try.

The tensors are forms on the meta device, with the arguments of the functions in ``products/calls.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxfuse.kernels import ahead, thin_choice, thin_outer, thin_pair, tuning, workers
from fxfuse.kernels.abilities import of_device


def pair(on: torch.device, buffer: Tensor | None, start: int, width: int, matrix: Tensor, right: Tensor, left: Tensor, alpha: float,
         beta: float, wide: bool) -> None:  # fmt: skip
    """Of ``calls.thin_pair``."""
    rank = right.shape[1]
    if buffer is None:
        buffer = matrix.new_empty((matrix.shape[0], width))
    across = buffer[:, start : start + rank]
    down = matrix.new_empty((matrix.shape[1], rank), dtype=torch.float32 if wide and matrix.itemsize < 4 else None)
    _compile(thin_pair.ThinPair, thin_pair.sizes_of(matrix, right, left, across), (matrix, right, left, across, down), matrix,
             (alpha, beta), on)  # fmt: skip


def product(on: torch.device, left: Tensor, right: Tensor, alpha: float) -> None:
    """Of ``calls.product``."""
    _outer(on, left, right, alpha, None)


def added_product(on: torch.device, base: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    """Of a sum ``base + alpha * left @ right`` that is no bias."""
    _outer(on, left, right, alpha, base)


def _outer(on: torch.device, left: Tensor, right: Tensor, alpha: float, base: Tensor | None) -> None:
    out = left.new_empty((left.shape[0], right.shape[1]))
    tensors = (left, right, out if base is None else base, out)
    _compile(thin_outer.ThinOuter, thin_outer.sizes_of(left, right, base, out), tensors, out, (alpha,), on)


def _compile(kind: Any, sizes: Any, tensors: tuple[Tensor, ...], large: Tensor, factors: tuple[float, ...], on: torch.device) -> None:
    worth = large.numel() * large.itemsize >= thin_choice.WORTH_TIMING
    if sizes is None or not worth or not tuning.enabled() or not of_device(on).pairs:
        return
    with ahead.announcing(on), workers.at_leisure():  # the library serves where they are late
        for config in kind.configs:
            kind(sizes, config, on, *factors).load(*tensors)
