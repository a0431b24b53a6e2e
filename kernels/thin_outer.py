"""``out [M, N] = alpha * left [M, R] @ right [R, N]``, R small: a matrix is written and next to nothing is read. Or ``base [M, N]`` is
read, too, and added.

Each instance makes one tile. The product is float32, and so is the sum; it is rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fxfuse.kernels.invoke import Kernel
from fxfuse.kernels.thin_outer_kernel import outer_kernel
from fxfuse.kernels.thin_pair import DTYPES, LEAST_RANK, MOST_RANK


@dataclass(frozen=True)
class Config:
    """rows, columns: of a tile. warps: of an instance."""

    rows: int = 64
    columns: int = 128
    warps: int = 4


# Tiles so small that five instances or more share a multiprocessor: on an H200 62 us for 8192 x 14336, twice as large tiles took 80.
CONFIGS = (Config(), Config(32, 256, 4), Config(32, 128, 4))


class Sizes(NamedTuple):
    """out [rows, columns], the rank, and the strides of left, right (both), base (0: there is none) and out."""

    rows: int
    columns: int
    rank: int
    left: int
    right: int
    right_step: int
    base: int
    out: int


def numbers_of(sizes: Sizes, config: Config, alpha: float) -> tuple[Any, ...]:
    """The kernel's arguments after the tensors."""
    ranks = max(LEAST_RANK, triton.next_power_of_2(sizes.rank))
    return (sizes.rows, sizes.columns, *sizes[3:], alpha, sizes.rank, ranks, config.rows, config.columns, int(sizes.base > 0))


class ThinOuter:
    """Launches the kernel for one set of sizes. Where there is no base, its place is the result's."""

    configs = CONFIGS

    def __init__(self, sizes: Sizes, config: Config, device: torch.device, alpha: float) -> None:
        self.kernel = Kernel(outer_kernel, numbers_of(sizes, config, alpha), {"num_warps": config.warps})
        self.instances = triton.cdiv(sizes.rows, config.rows) * triton.cdiv(sizes.columns, config.columns)

    def load(self, left: Tensor, right: Tensor, base: Tensor, out: Tensor) -> None:
        """Compiles it and loads it onto the device. Raises Triton's OutOfResources where it does not fit."""
        self.kernel.load((left, right, base, out))

    def __call__(self, left: Tensor, right: Tensor, base: Tensor, out: Tensor) -> None:
        """Into ``out``; tensors as the sizes say."""
        self.kernel((left, right, base, out), self.instances)


def sizes_of(left: Tensor, right: Tensor, base: Tensor | None, out: Tensor) -> Sizes | None:
    """The sizes of a product; None if the kernel does not take such tensors."""
    rank = left.shape[1]
    if base is not None and (base.dtype != out.dtype or base.shape != out.shape or base.stride(1) != 1 or base.stride(0) < 1):
        return None
    fits = (out.dtype in DTYPES and left.dtype == right.dtype == out.dtype and left.stride(1) == out.stride(1) == 1
            and 0 < rank <= MOST_RANK and right.shape[0] == rank and out.shape == (left.shape[0], right.shape[1])
            and 0 < out.numel() < 2**37)  # fmt: skip
    if not fits:
        return None
    return Sizes(out.shape[0], out.shape[1], rank, left.stride(0), right.stride(0), right.stride(1),
                 0 if base is None else base.stride(0), out.stride(0))
