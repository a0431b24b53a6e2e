"""The kernels of thin_pair.py, which launches them. (Nothing here imports torch: see compile_worker.py.)"""

from __future__ import annotations

import triton
import triton.language as tl

from fxfuse.kernels.device import INTERPRETED, let_next_kernel_start, round_to, wait_for_earlier_kernel

if INTERPRETED.value:

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
def _added_up(parts, out, numbers, count, stride, factor, instance, RANK: tl.constexpr, PARTS: tl.constexpr,
              SUMMED: tl.constexpr):  # fmt: skip
    """``out`` [numbers / RANK, RANK], rows ``stride`` apart, = factor * the sum of ``parts`` [count, numbers], in one order
    always; PARTS of them are on their way at once."""
    number = instance * SUMMED + tl.arange(0, SUMMED)
    inside = number < numbers
    total = tl.zeros((SUMMED,), tl.float32)
    place = parts + number
    for first in range(0, count, PARTS):
        for part in tl.static_range(PARTS):
            total += tl.load(place, mask=inside & (first + part < count), other=0.0)
            place += numbers
    result = round_to(total * factor, out.dtype.element_ty)
    tl.store(out + (number // RANK).to(tl.int64) * stride + number % RANK, result, mask=inside)


@triton.jit
def sums_kernel(across_parts, down_parts, across, down, rows, columns, across_stride, blocks, splits, alpha, beta,
                RANK: tl.constexpr, PARTS: tl.constexpr, SUMMED: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """Adds up what ``parts_kernel`` left."""
    wait_for_earlier_kernel(EARLY)
    instance = tl.program_id(0)
    for_across = tl.cdiv(rows * RANK, SUMMED)
    if instance < for_across:
        _added_up(across_parts, across, rows * RANK, blocks, across_stride, alpha, instance, RANK, PARTS, SUMMED)
    else:
        _added_up(down_parts, down, columns * RANK, splits, RANK, beta, instance - for_across, RANK, PARTS, SUMMED)
