"""A row program

Written by fxfuse: schedule "rows" (a program instance holds whole rows in registers), for the row program

    program rank=1 math=float32
    axis a = ?
    arg x : bfloat16[r|a]
    arg w : bfloat16[1|a]
    %0 = load x a 0 1
    %1 = load w a 0 1
    %2 = square %0
    %3 = sum a %2
    %4 = width a
    %5 = div %3 %4
    %6 = const 1e-06
    %7 = add %5 %6
    %8 = rsqrt %7
    %9 = mul %0 %8
    %10 = cast bfloat16 %9
    %11 = mul %1 %10
    out y : bfloat16[r|a] = %11 @ a 0 1
    out rstd : float32[r|] = %8
"""

import triton
import triton.language as tl

from fxfuse.kernels import device


@triton.jit(do_not_specialize=["n_rows", "s_rstd_0"])
def kernel(
    p_x, p_w, p_y, p_rstd, s_x_0, s_y_0, s_rstd_0, n_rows, W_a, B_a: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    unit = tl.zeros((1, 1), tl.int32)
    rows = tl.program_id(0)
    p_x_row = p_x + rows * s_x_0
    p_y_row = p_y + rows * s_y_0
    p_rstd_row = p_rstd + rows * s_rstd_0
    a = tl.arange(0, B_a)[None, :]
    b_x = tl.load(p_x_row + a).to(tl.float32)
    b_w = tl.load(p_w + a).to(tl.float32)
    v2 = b_x * b_x
    v3 = tl.sum(v2, 1, keep_dims=True)
    v5 = device.divide(v3, tl.full((1, 1), W_a, tl.float32))
    v7 = v5 + 1e-06
    v8 = tl.rsqrt(v7)
    v9 = b_x * v8
    v10 = device.round_to(v9, tl.bfloat16).to(tl.float32)
    v11 = b_w * v10
    tl.store(p_y_row + a, device.round_to(v11, tl.bfloat16))
    tl.store(p_rstd_row + unit, v8)
