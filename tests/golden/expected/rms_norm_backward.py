"""A row program

Written by fxfuse: schedule "rows" (a program instance holds whole rows in registers), for the row program

    program rank=1 math=float32
    axis a = ?
    arg x : bfloat16[r|a]
    arg w : bfloat16[1|a]
    arg rstd : float32[r|]
    arg g_y : bfloat16[r|a]
    %0 = load x a 0 1
    %1 = load w a 0 1
    %2 = width a
    %3 = load rstd None
    %4 = mul %0 %3
    %5 = cast bfloat16 %4
    %6 = load g_y a 0 1
    %7 = mul %6 %5
    %8 = mul %6 %1
    %9 = mul %3 %8
    %10 = mul %8 %0
    %11 = sum a %10
    %12 = square %3
    %13 = mul %12 %3
    %14 = const 0.5
    %15 = mul %14 %11
    %16 = mul %15 %13
    %17 = div %16 %2
    %18 = const 2.0
    %19 = mul %18 %17
    %20 = mul %19 %0
    %21 = sub %9 %20
    out d_x : bfloat16[r|a] = %21 @ a 0 1
    out d_w : bfloat16[1|a] = %7 @ a 0 1
"""

import triton
import triton.language as tl

from fxfuse.kernels import device


@triton.jit(do_not_specialize=["n_rows", "s_rstd_0"])
def kernel(
    p_x, p_w, p_rstd, p_g_y, p_d_x, p_partials, s_x_0, s_rstd_0, s_g_y_0, s_d_x_0, n_rows, W_a,
    B_a: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):
    unit = tl.zeros((1, 1), tl.int32)
    device.let_next_kernel_start(EARLY)
    a = tl.arange(0, B_a)[None, :]
    b_w = tl.load(p_w + a).to(tl.float32)
    sum_d_w_0 = tl.zeros((1, B_a), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(n_rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = tile
        p_x_row = p_x + rows * s_x_0
        p_rstd_row = p_rstd + rows * s_rstd_0
        p_g_y_row = p_g_y + rows * s_g_y_0
        p_d_x_row = p_d_x + rows * s_d_x_0
        b_x = tl.load(p_x_row + a).to(tl.float32)
        b_rstd = tl.load(p_rstd_row + unit)
        v4 = b_x * b_rstd
        v5 = device.round_to(v4, tl.bfloat16).to(tl.float32)
        b_g_y = tl.load(p_g_y_row + a).to(tl.float32)
        v7 = b_g_y * v5
        v8 = b_g_y * b_w
        v9 = b_rstd * v8
        v10 = v8 * b_x
        v11 = tl.sum(v10, 1, keep_dims=True)
        v12 = b_rstd * b_rstd
        v13 = v12 * b_rstd
        v15 = 0.5 * v11
        v16 = v15 * v13
        v17 = device.divide(v16, tl.full((1, 1), W_a, tl.float32))
        v19 = 2.0 * v17
        v20 = v19 * b_x
        v21 = v9 - v20
        tl.store(p_d_x_row + a, device.round_to(v21, tl.bfloat16))
        sum_d_w_0 += v7
    p_part = p_partials + tl.program_id(0).to(tl.int64) * (W_a)
    tl.store(p_part + (0) + a, tl.sum(sum_d_w_0, 0, keep_dims=True))


@triton.jit(do_not_specialize=["n_parts"])
def finish(p_partials, p_d_w, n_parts, W_a, P: tl.constexpr, B: tl.constexpr, EARLY: tl.constexpr):
    device.wait_for_earlier_kernel(EARLY)
    n_columns = W_a
    parts = tl.arange(0, P)[:, None]
    columns = tl.program_id(0) * B + tl.arange(0, B)[None, :]
    total = tl.zeros((P, B), tl.float32)
    for first in range(0, n_parts, P):
        p_part = p_partials + (first + parts).to(tl.int64) * n_columns + columns
        total += tl.load(p_part, mask=(first + parts < n_parts) & (columns < n_columns), other=0.0)
    total = tl.sum(total, 0, keep_dims=True)
    column = columns - (0)
    tl.store(p_d_w + column, device.round_to(total, tl.bfloat16), mask=(column >= 0) & (column < W_a))
