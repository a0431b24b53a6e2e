"""A row program

Written by fxfuse: schedule "rows" (a program instance holds whole rows in registers), for the row program

    program rank=1 math=float32
    axis a = 12288
    arg x : bfloat16[r|a]
    arg w : bfloat16[1|a]
    arg mean : float32[r|]
    arg rstd : float32[r|]
    arg g_y : bfloat16[r|a]
    %0 = load x a 0 1
    %1 = load w a 0 1
    %2 = width a
    %3 = load mean None
    %4 = sub %0 %3
    %5 = load rstd None
    %6 = mul %4 %5
    %7 = load g_y a 0 1
    %8 = mul %7 %1
    %9 = mul %7 %6
    %10 = mul %5 %8
    %11 = mul %8 %4
    %12 = sum a %11
    %13 = square %5
    %14 = mul %13 %5
    %15 = const 0.5
    %16 = mul %15 %12
    %17 = mul %16 %14
    %18 = div %17 %2
    %19 = const 2.0
    %20 = mul %19 %18
    %21 = mul %20 %4
    %22 = sub %10 %21
    %23 = sum a %22
    %24 = div %23 %2
    %25 = sub %22 %24
    out d_x : bfloat16[r|a] = %25 @ a 0 1
    out d_w : bfloat16[1|a] = %9 @ a 0 1
    out d_b : bfloat16[1|a] = %7 @ a 0 1
"""

import triton
import triton.language as tl

from fxfuse.kernels import device


@triton.jit(do_not_specialize=["n_rows", "s_mean_0", "s_rstd_0"])
def kernel(
    p_x, p_w, p_mean, p_rstd, p_g_y, p_d_x, p_partials, s_x_0, s_mean_0, s_rstd_0, s_g_y_0, s_d_x_0, n_rows,
    W_a: tl.constexpr, B_a: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):
    unit = tl.zeros((1, 1), tl.int32)
    device.let_next_kernel_start(EARLY)
    a_0 = tl.arange(0, B_a)[None, :]
    a_1 = 1 * B_a + tl.arange(0, B_a)[None, :]
    a_2 = 2 * B_a + tl.arange(0, B_a)[None, :]
    sum_d_w_0_0 = tl.zeros((1, B_a), tl.float32)
    sum_d_b_0_0 = tl.zeros((1, B_a), tl.float32)
    sum_d_w_0_1 = tl.zeros((1, B_a), tl.float32)
    sum_d_b_0_1 = tl.zeros((1, B_a), tl.float32)
    sum_d_w_0_2 = tl.zeros((1, B_a), tl.float32)
    sum_d_b_0_2 = tl.zeros((1, B_a), tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(n_rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = tile
        p_x_row = p_x + rows * s_x_0
        p_mean_row = p_mean + rows * s_mean_0
        p_rstd_row = p_rstd + rows * s_rstd_0
        p_g_y_row = p_g_y + rows * s_g_y_0
        p_d_x_row = p_d_x + rows * s_d_x_0
        b_x_0 = tl.load(p_x_row + a_0).to(tl.float32)
        b_x_1 = tl.load(p_x_row + a_1).to(tl.float32)
        b_x_2 = tl.load(p_x_row + a_2).to(tl.float32)
        b_mean = tl.load(p_mean_row + unit)
        b_rstd = tl.load(p_rstd_row + unit)
        b_g_y_0 = tl.load(p_g_y_row + a_0).to(tl.float32)
        b_g_y_1 = tl.load(p_g_y_row + a_1).to(tl.float32)
        b_g_y_2 = tl.load(p_g_y_row + a_2).to(tl.float32)
        v4_0 = b_x_0 - b_mean
        v4_1 = b_x_1 - b_mean
        v4_2 = b_x_2 - b_mean
        v6_0 = v4_0 * b_rstd
        v6_1 = v4_1 * b_rstd
        v6_2 = v4_2 * b_rstd
        v9_0 = b_g_y_0 * v6_0
        v9_1 = b_g_y_1 * v6_1
        v9_2 = b_g_y_2 * v6_2
        sum_d_w_0_0 += v9_0
        sum_d_b_0_0 += b_g_y_0
        sum_d_w_0_1 += v9_1
        sum_d_b_0_1 += b_g_y_1
        sum_d_w_0_2 += v9_2
        sum_d_b_0_2 += b_g_y_2
        b_w_0 = tl.load(p_w + a_0).to(tl.float32)
        b_w_1 = tl.load(p_w + a_1).to(tl.float32)
        b_w_2 = tl.load(p_w + a_2).to(tl.float32)
        v8_0 = b_g_y_0 * b_w_0
        v8_1 = b_g_y_1 * b_w_1
        v8_2 = b_g_y_2 * b_w_2
        v10_0 = b_rstd * v8_0
        v10_1 = b_rstd * v8_1
        v10_2 = b_rstd * v8_2
        v11_0 = v8_0 * v4_0
        v11_1 = v8_1 * v4_1
        v11_2 = v8_2 * v4_2
        v12 = tl.sum(v11_0 + v11_1 + v11_2, 1, keep_dims=True)
        v13 = b_rstd * b_rstd
        v14 = v13 * b_rstd
        v16 = 0.5 * v12
        v17 = v16 * v14
        v18 = device.divide(v17, tl.full((1, 1), W_a, tl.float32))
        v20 = 2.0 * v18
        v21_0 = v20 * v4_0
        v21_1 = v20 * v4_1
        v21_2 = v20 * v4_2
        v22_0 = v10_0 - v21_0
        v22_1 = v10_1 - v21_1
        v22_2 = v10_2 - v21_2
        v23 = tl.sum(v22_0 + v22_1 + v22_2, 1, keep_dims=True)
        v24 = device.divide(v23, tl.full((1, 1), W_a, tl.float32))
        v25_0 = v22_0 - v24
        v25_1 = v22_1 - v24
        v25_2 = v22_2 - v24
        tl.store(p_d_x_row + a_0, device.round_to(v25_0, tl.bfloat16))
        tl.store(p_d_x_row + a_1, device.round_to(v25_1, tl.bfloat16))
        tl.store(p_d_x_row + a_2, device.round_to(v25_2, tl.bfloat16))
    p_part = p_partials + tl.program_id(0).to(tl.int64) * (W_a + W_a)
    tl.store(p_part + (0) + a_0, tl.sum(sum_d_w_0_0, 0, keep_dims=True))
    tl.store(p_part + (0 + W_a) + a_0, tl.sum(sum_d_b_0_0, 0, keep_dims=True))
    tl.store(p_part + (0) + a_1, tl.sum(sum_d_w_0_1, 0, keep_dims=True))
    tl.store(p_part + (0 + W_a) + a_1, tl.sum(sum_d_b_0_1, 0, keep_dims=True))
    tl.store(p_part + (0) + a_2, tl.sum(sum_d_w_0_2, 0, keep_dims=True))
    tl.store(p_part + (0 + W_a) + a_2, tl.sum(sum_d_b_0_2, 0, keep_dims=True))


@triton.jit(do_not_specialize=["n_parts"])
def finish(p_partials, p_d_w, p_d_b, n_parts, W_a, P: tl.constexpr, B: tl.constexpr, EARLY: tl.constexpr):
    device.wait_for_earlier_kernel(EARLY)
    n_columns = W_a + W_a
    parts = tl.arange(0, P)[:, None]
    columns = tl.program_id(0) * B + tl.arange(0, B)[None, :]
    total = tl.zeros((P, B), tl.float32)
    for first in range(0, n_parts, P):
        p_part = p_partials + (first + parts).to(tl.int64) * n_columns + columns
        total += tl.load(p_part, mask=(first + parts < n_parts) & (columns < n_columns), other=0.0)
    total = tl.sum(total, 0, keep_dims=True)
    column = columns - (0)
    tl.store(p_d_w + column, device.round_to(total, tl.bfloat16), mask=(column >= 0) & (column < W_a))
    column = columns - (0 + W_a)
    tl.store(p_d_b + column, device.round_to(total, tl.bfloat16), mask=(column >= 0) & (column < W_a))
