"""Two thin products of one large matrix, of which it is read once.

    across [M, R] = alpha * matrix [M, N] @ right [N, R]
    down   [N, R] = beta * matrix' @ left [M, R]

An instance walks down a block of columns in tiles. Each tile gives a part of ``across``, over the block's columns alone, which is
stored in float32; ``down`` stays in registers until the instance's rows end. A second kernel adds up the parts, in one order always, so
results are the same from run to run; products and sums are float32 and are rounded once.

Both are gradients of a low-rank term ``alpha * h B'``: of h, ``alpha * dY B``, and of B, ``alpha * dY' h``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fxfuse.kernels.abilities import of_device
from fxfuse.kernels.invoke import Kernel
from fxfuse.kernels.thin_pair_kernel import parts_kernel, sums_kernel

DTYPES = (torch.bfloat16, torch.float16)
LEAST_RANK, MOST_RANK = 16, 64  # columns of a tensor core's product; more would not stay in registers
PARTS, SUMMED = 8, 256  # parts that an instance of the second kernel loads at once, of how many numbers of a result


@dataclass(frozen=True)
class Config:
    """rows, columns: of a tile. warps: of an instance. stages: tiles on their way at a time. waves: instances for a multiprocessor."""

    rows: int = 64
    columns: int = 256
    warps: int = 4
    stages: int = 3
    waves: int = 2


# Of 14336 columns one wave of (64, 512) or (128, 256) is 112 instances; two leave fewer of an H200's 132 multiprocessors idle.
CONFIGS = (Config(), Config(64, 512, 8, 3, 1), Config(128, 256, 8, 3, 1), Config(64, 512, 8, 3, 2), Config(64, 128, 4, 4, 3))


class Sizes(NamedTuple):
    """Of a pair: matrix [rows, columns], the rank, and the strides of matrix, right (both), left and across."""

    rows: int
    columns: int
    rank: int
    matrix: int
    right: int
    right_step: int
    left: int
    across: int


class Plan(NamedTuple):
    """What both kernels are launched with: integer arguments, options, instances; the parts of each result."""

    parts: tuple[int, ...]
    options: dict[str, Any]
    instances: int
    blocks: int
    splits: int


def plan(sizes: Sizes, config: Config, multiprocessors: int, early: bool) -> Plan:
    """Blocks of columns times splits of rows fill the device ``config.waves`` times."""
    blocks = triton.cdiv(sizes.columns, config.columns)
    splits = max(1, config.waves * multiprocessors // blocks)
    rows_each = triton.cdiv(triton.cdiv(sizes.rows, splits), config.rows) * config.rows
    splits = triton.cdiv(sizes.rows, rows_each)
    ranks = max(LEAST_RANK, triton.next_power_of_2(sizes.rank))
    numbers = (sizes.rows, sizes.columns, sizes.matrix, sizes.right, sizes.right_step, sizes.left, rows_each,
               sizes.rank, ranks, config.rows, config.columns, config.stages, int(early))  # fmt: skip
    return Plan(numbers, {"num_warps": config.warps}, blocks * splits, blocks, splits)


@lru_cache(maxsize=8)
def multiprocessors(device: torch.device) -> int:
    """How many there are; two where nothing is timed."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


class ThinPair:
    """Launches both kernels for one set of sizes, on one device."""

    configs = CONFIGS

    def __init__(self, sizes: Sizes, config: Config, device: torch.device, alpha: float, beta: float) -> None:
        early = of_device(device).early
        rows, columns, rank = sizes.rows, sizes.columns, sizes.rank
        self.plan = made = plan(sizes, config, multiprocessors(device), early)
        length = triton.cdiv(made.blocks * rows * rank, 4) * 4  # what follows is aligned, too
        self.length, self.offset = length + made.splits * columns * rank, 4 * length  # numbers of all parts; bytes before ``down``'s
        self.sums = triton.cdiv(rows * rank, SUMMED) + triton.cdiv(columns * rank, SUMMED)
        self.partial = Kernel(parts_kernel, made.parts, made.options)
        self.total = Kernel(sums_kernel, (sizes.rows, sizes.columns, sizes.across, made.blocks, made.splits, alpha, beta,  # type: ignore[arg-type]
                                          sizes.rank, PARTS, SUMMED, int(early)),
                            {"num_warps": 4} | ({"launch_pdl": True} if early else {}))

    def load(self, matrix: Tensor, right: Tensor, left: Tensor, across: Tensor, down: Tensor) -> None:
        """Compiles both and loads them onto the device. Raises Triton's OutOfResources where one does not fit."""
        parts = matrix.new_empty(4, dtype=torch.float32)
        self.partial.load((matrix, right, left, parts, parts))
        self.total.load((parts, parts, across, down))

    def __call__(self, matrix: Tensor, right: Tensor, left: Tensor, across: Tensor, down: Tensor) -> None:
        """Into ``across`` and ``down``; tensors as ``sizes`` says, ``down`` contiguous."""
        parts = matrix.new_empty(self.length, dtype=torch.float32)
        second = self.offset // parts.itemsize
        across_parts, down_parts = parts[:second], parts[second:]
        self.partial((matrix, right, left, across_parts, down_parts), self.plan.instances)
        self.total((across_parts, down_parts, across, down), self.sums)


def sizes_of(matrix: Tensor, right: Tensor, left: Tensor, across: Tensor) -> Sizes | None:
    """The sizes of a pair; None if the kernel does not take such tensors."""
    (rows, columns), rank = matrix.shape, right.shape[1]
    fits = (matrix.dtype in DTYPES and {right.dtype, left.dtype, across.dtype} == {matrix.dtype}
            and matrix.stride(1) == left.stride(1) == across.stride(1) == 1 and left.shape == across.shape == (rows, rank)
            and right.shape[0] == columns and 0 < rank <= MOST_RANK and rows * columns > 0
            and rows * rank * triton.cdiv(columns, 128) < 2**31)  # fmt: skip
    if not fits:
        return None
    return Sizes(rows, columns, rank, matrix.stride(0), right.stride(0), right.stride(1), left.stride(0), across.stride(0))
