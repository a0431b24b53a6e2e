"""The kernel of thin_outer.py, which launches it. (Nothing here imports torch: see compile_worker.py.)"""

from __future__ import annotations

import triton
import triton.language as tl

from fxfuse.kernels.device import round_to
from fxfuse.kernels.thin_pair_kernel import product


@triton.jit
def outer_kernel(left, right, base, out, rows, columns, left_stride, right_stride, right_step, base_stride, out_stride, alpha,
                 RANK: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BASED: tl.constexpr):  # fmt: skip
    blocks = tl.cdiv(columns, COLUMNS)
    row = (tl.program_id(0) // blocks) * ROWS + tl.arange(0, ROWS)
    column, rank = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, RANKS)
    in_rows, in_columns, in_ranks = row < rows, column < columns, rank < RANK
    place = row.to(tl.int64)
    inside = in_rows[:, None] & in_columns[None, :]
    if BASED:  # on its way while the rest is read and multiplied
        b_base = tl.load(base + place[:, None] * base_stride + column[None, :], mask=inside, other=0.0)
    b_left = tl.load(left + place[:, None] * left_stride + rank[None, :], mask=in_rows[:, None] & in_ranks[None, :], other=0.0)
    b_right = tl.load(right + rank[:, None] * right_stride + column[None, :] * right_step,
                      mask=in_ranks[:, None] & in_columns[None, :], other=0.0)  # fmt: skip
    b_out = product(b_left, b_right, tl.zeros((ROWS, COLUMNS), tl.float32)) * alpha
    if BASED:
        b_out += b_base
    tl.store(out + place[:, None] * out_stride + column[None, :], round_to(b_out, out.dtype.element_ty), mask=inside)
