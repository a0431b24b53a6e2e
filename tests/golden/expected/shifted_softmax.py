"""A row program

Written by fxfuse: schedule "rows" (a program instance holds whole rows in registers), for the row program

    program rank=1 math=float32
    axis a = ?
    arg x : bfloat16[r|a]
    %0 = load x a 0 1
    %1 = max a %0
    %2 = stop %1
    %3 = sub %0 %2
    %4 = exp %3
    %5 = sum a %4
    %6 = div %4 %5
    out y : bfloat16[r|a] = %6 @ a 0 1
"""

import triton
import triton.language as tl

from fxfuse.kernels import device


@triton.jit(do_not_specialize=["n_rows"])
def kernel(
    p_x, p_y, s_x_0, s_y_0, n_rows, W_a, B_a: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):
    unit = tl.zeros((1, 1), tl.int32)
    rows = tl.program_id(0)
    p_x_row = p_x + rows * s_x_0
    p_y_row = p_y + rows * s_y_0
    a = tl.arange(0, B_a)[None, :]
    b_x = tl.load(p_x_row + a).to(tl.float32)
    v1 = device.row_max(b_x)
    v3 = b_x - v1
    v4 = device.quick_exp(v3)
    v5 = tl.sum(v4, 1, keep_dims=True)
    v6 = device.divide_by_row(v4, v5, exact=False)
    tl.store(p_y_row + a, device.round_to(v6, tl.bfloat16))
