"""Sums of a few rows each: ``out[t] = y[place[t, 0]] + ... + y[place[t, K-1]]``, added up in float32 (float64) and rounded once.

Every row of ``y`` is read once, where it lies; gathering first would write and read all of them again. A program instance has one
block of columns of one row of the result; the order of the sum is that of the places.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxfuse.kernels import device
from fxfuse.kernels.invoke import Kernel

BLOCK = 1024


@triton.jit
def collect_kernel(y, place, out, WIDTH: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr):
    """y [s, WIDTH], place [t * K] int64, out [t, WIDTH]; all dense."""
    across: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    row = tl.program_id(0) // across
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < WIDTH
    total = tl.load(y + tl.load(place + row.to(tl.int64) * K) * WIDTH + column, mask=inside, other=0.0)
    total = total.to(tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32)
    for k in tl.static_range(1, K):
        total += tl.load(y + tl.load(place + row.to(tl.int64) * K + k) * WIDTH + column, mask=inside, other=0.0).to(total.dtype)
    if out.dtype.element_ty != total.dtype:
        total = device.round_to(total, out.dtype.element_ty)
    tl.store(out + row.to(tl.int64) * WIDTH + column, total, mask=inside)


@lru_cache(maxsize=256)
def _kernel(width: int, k: int, dtype: torch.dtype, alignment: tuple[int, ...], index: int) -> Kernel:
    """For tensors of one dtype and alignment on the device ``index``, which compiled code is specialised on."""
    columns = min(BLOCK, triton.next_power_of_2(width))
    return Kernel(collect_kernel, (width, k, columns), {"num_warps": max(1, min(8, columns // 256))})


def collect(y: Tensor, place: Tensor, k: int) -> Tensor:
    """[s, width], [t * k] -> [t, width]"""
    width = y.shape[1]
    y, place = y.contiguous(), place.contiguous()
    out = torch.empty((len(place) // k, width), dtype=y.dtype, device=y.device)
    if out.numel():
        tensors = (y, place, out)
        kernel = _kernel(width, k, y.dtype, tuple(t.data_ptr() & 15 for t in tensors), y.get_device())
        kernel(tensors, len(out) * -(-width // BLOCK))
    return out
