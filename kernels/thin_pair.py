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
import triton.language as tl
from torch import Tensor

from fxfuse.kernels.abilities import of_device
from fxfuse.kernels.device import let_next_kernel_start, round_to, wait_for_earlier_kernel
from fxfuse.kernels.invoke import INTERPRETED, Kernel

DTYPES = (torch.bfloat16, torch.float16)
LEAST_RANK, MOST_RANK = 16, 64  # columns of a tensor core's product; more would not stay in registers
SUMMED = 256  # numbers of a result that an instance of the second kernel adds up


@dataclass(frozen=True)
class Config:
    """rows, columns: of a tile. warps: of an instance. stages: tiles on their way at a time. waves: instances for a multiprocessor."""

    rows: int = 64
    columns: int = 256
    warps: int = 4
    stages: int = 3
    waves: int = 2


CONFIGS = (Config(), Config(64, 128, 4, 4, 3), Config(128, 128, 8, 3, 2), Config(128, 256, 8, 3, 1))


if INTERPRETED:

    @triton.jit
    def product(a, b, total):
        """The interpreter takes bfloat16 numbers for integers here."""
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)

else:

    @triton.jit
    def product(a, b, total):
        """total + a @ b, in float32."""
        return tl.dot(a, b, total)


@triton.jit
def parts_kernel(matrix, right, left, across, down, rows, columns, matrix_stride, right_stride, right_step, left_stride, rows_each,
                 RANK: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
                 EARLY: tl.constexpr):  # fmt: skip
    """``across`` [blocks, M, RANK] and ``down`` [splits, N, RANK], float32: the parts of each block of columns and split of rows."""
    blocks = tl.cdiv(columns, COLUMNS)
    block, split = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    column, rank = block * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, RANKS)
    in_columns, in_ranks = column < columns, rank < RANK
    b_right = tl.load(right + column[:, None] * right_stride + rank[None, :] * right_step,
                      mask=in_columns[:, None] & in_ranks[None, :], other=0.0)  # fmt: skip
    b_down = tl.zeros((COLUMNS, RANKS), tl.float32)
    first = split * rows_each
    end = tl.minimum(first + rows_each, rows)
    for start in tl.range(first, end, ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        in_rows = row < end
        place = row.to(tl.int64)
        tile = tl.load(matrix + place[:, None] * matrix_stride + column[None, :],
                       mask=in_rows[:, None] & in_columns[None, :], other=0.0)  # fmt: skip
        b_left = tl.load(left + place[:, None] * left_stride + rank[None, :], mask=in_rows[:, None] & in_ranks[None, :], other=0.0)
        b_down = product(tl.trans(tile), b_left, b_down)
        b_across = product(tile, b_right, tl.zeros((ROWS, RANKS), tl.float32))
        tl.store(across + (block * rows + row).to(tl.int64)[:, None] * RANK + rank[None, :], b_across,
                 mask=in_rows[:, None] & in_ranks[None, :])  # fmt: skip
    let_next_kernel_start(EARLY)
    tl.store(down + (split * columns + column)[:, None] * RANK + rank[None, :], b_down, mask=in_columns[:, None] & in_ranks[None, :])


@triton.jit
def _added_up(parts, out, numbers, count, stride, factor, instance, RANK: tl.constexpr, SUMMED: tl.constexpr):
    """``out`` [numbers / RANK, RANK], rows ``stride`` apart, = factor * the sum of ``parts`` [count, numbers], first to last."""
    number = instance * SUMMED + tl.arange(0, SUMMED)
    inside = number < numbers
    total = tl.zeros((SUMMED,), tl.float32)
    place = parts + number
    for _ in range(count):
        total += tl.load(place, mask=inside, other=0.0)
        place += numbers
    tl.store(out + (number // RANK).to(tl.int64) * stride + number % RANK, round_to(total * factor, out.dtype.element_ty), mask=inside)


@triton.jit
def sums_kernel(across_parts, down_parts, across, down, rows, columns, across_stride, blocks, splits, alpha, beta,
                RANK: tl.constexpr, SUMMED: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """Adds up what ``parts_kernel`` left."""
    wait_for_earlier_kernel(EARLY)
    instance = tl.program_id(0)
    for_across = tl.cdiv(rows * RANK, SUMMED)
    if instance < for_across:
        _added_up(across_parts, across, rows * RANK, blocks, across_stride, alpha, instance, RANK, SUMMED)
    else:
        _added_up(down_parts, down, columns * RANK, splits, RANK, beta, instance - for_across, RANK, SUMMED)


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
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


class ThinPair:
    """Launches both kernels for one set of sizes, on one device."""

    configs = CONFIGS

    def __init__(self, sizes: Sizes, config: Config, device: torch.device, alpha: float, beta: float) -> None:
        early = of_device(device).early
        rows, columns, rank = sizes[:3]
        self.plan = made = plan(sizes, config, _multiprocessors(device), early)
        length = triton.cdiv(made.blocks * rows * rank, 4) * 4  # what follows is aligned, too
        self.length, self.offset = length + made.splits * columns * rank, 4 * length  # numbers of all parts; bytes before ``down``'s
        self.sums = triton.cdiv(rows * rank, SUMMED) + triton.cdiv(columns * rank, SUMMED)
        self.partial = Kernel(parts_kernel, made.parts, made.options)
        self.total = Kernel(sums_kernel, (sizes.rows, sizes.columns, sizes.across, made.blocks, made.splits, alpha, beta,  # type: ignore[arg-type]
                                          sizes.rank, SUMMED, int(early)), {"num_warps": 4} | ({"launch_pdl": True} if early else {}))

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
    rows, columns, rank = *matrix.shape, right.shape[1]
    fits = (matrix.dtype in DTYPES and {right.dtype, left.dtype, across.dtype} == {matrix.dtype}
            and matrix.stride(1) == left.stride(1) == across.stride(1) == 1 and left.shape == across.shape == (rows, rank)
            and right.shape[0] == columns and 0 < rank <= MOST_RANK and rows * columns > 0
            and rows * rank * triton.cdiv(columns, 128) < 2**31)  # fmt: skip
    if not fits:
        return None
    return Sizes(rows, columns, rank, matrix.stride(0), right.stride(0), right.stride(1), left.stride(0), across.stride(0))
