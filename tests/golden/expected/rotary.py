"""A row program

Written by fxfuse: schedule "rows" (a program instance holds whole rows in registers), for the row program

    program rank=3 math=float32
    axis half = 8
    arg x : bfloat16[r,r,r|16]
    arg cos : bfloat16[r,1,r|16]
    arg sin : bfloat16[r,1,r|16]
    %0 = load x half 0 1
    %1 = load x half 8 1
    %2 = load cos half 0 1
    %3 = load cos half 8 1
    %4 = load sin half 0 1
    %5 = load sin half 8 1
    %6 = mul %0 %2
    %7 = mul %1 %4
    %8 = sub %6 %7
    %9 = mul %1 %3
    %10 = mul %0 %5
    %11 = add %9 %10
    out y : bfloat16[r,r,r|16] = %8 @ half 0 1, %11 @ half 8 1
"""

import triton
import triton.language as tl

from fxfuse.kernels import device


@triton.jit(do_not_specialize=["n_rows", "n_1"])
def kernel(
    p_x, p_cos, p_sin, p_y, s_x_0, s_x_1, s_cos_0, s_sin_0, s_y_0, s_y_1, n_rows, n_1, W_half: tl.constexpr,
    B_half: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):
    unit = tl.zeros((1, 1), tl.int32)
    half_together = tl.zeros((32, 1), tl.int32)
    tile_index = tl.program_id(0)
    n_inner_tiles = tl.cdiv(n_1, ROWS)
    i1 = tile_index % n_inner_tiles * ROWS + tl.arange(0, ROWS)[:, None]
    i0 = tile_index // n_inner_tiles
    p_x_row = p_x + i0 * s_x_0 + i1 * s_x_1
    p_cos_row = p_cos + i0 * s_cos_0
    p_sin_row = p_sin + i0 * s_sin_0
    p_y_row = p_y + i0 * s_y_0 + i1 * s_y_1
    half = tl.arange(0, B_half)[None, :]
    b_x_0 = tl.load(p_x_row + half).to(tl.float32)
    b_x_1 = tl.load(p_x_row + 8 + half).to(tl.float32)
    b_cos_2 = device.repeat_rows(tl.load(p_cos_row + half + half_together).to(tl.float32), ROWS)
    b_cos_3 = device.repeat_rows(tl.load(p_cos_row + 8 + half + half_together).to(tl.float32), ROWS)
    b_sin_4 = device.repeat_rows(tl.load(p_sin_row + half + half_together).to(tl.float32), ROWS)
    b_sin_5 = device.repeat_rows(tl.load(p_sin_row + 8 + half + half_together).to(tl.float32), ROWS)
    v6 = b_x_0 * b_cos_2
    v7 = b_x_1 * b_sin_4
    v8 = v6 - v7
    v9 = b_x_1 * b_cos_3
    v10 = b_x_0 * b_sin_5
    v11 = v9 + v10
    tl.store(p_y_row + half, device.round_to(v8, tl.bfloat16))
    tl.store(p_y_row + 8 + half, device.round_to(v11, tl.bfloat16))
