"""A row program

Written by fxfuse: schedule "tiled" (a program instance maps a block of columns of some rows), for the row program

    program rank=1 math=float32
    axis a = ?
    arg x : bfloat16[r|a]
    arg label : int64[r|]
    arg lse : float32[r|]
    arg g_loss : float32[r|]
    %0 = load x a 0 1
    %1 = load label None
    %2 = const -100
    %3 = ne %1 %2
    %4 = const 0
    %5 = select %3 %1 %4
    %6 = load lse None
    %7 = iota a
    %8 = eq %7 %5
    %9 = const 0.0
    %10 = load g_loss None
    %11 = select %3 %10 %9
    %12 = neg %11
    %13 = select %8 %12 %9
    %14 = sub %0 %6
    %15 = exp %14
    %16 = mul %11 %15
    %17 = add %13 %16
    out d_x : bfloat16[r|a] = %17 @ a 0 1
"""

import triton
import triton.language as tl

from fxfuse.kernels import device


@triton.jit(do_not_specialize=["n_rows", "s_label_0", "s_lse_0", "s_g_loss_0"])
def kernel(
    p_x, p_label, p_lse, p_g_loss, p_d_x, s_x_0, s_label_0, s_lse_0, s_g_loss_0, s_d_x_0, n_rows, W_a,
    B_a: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):
    unit = tl.zeros((1, 1), tl.int32)
    n_blocks = tl.cdiv(W_a, B_a)
    start = (tl.program_id(0) % n_blocks) * B_a
    a = start + tl.arange(0, B_a)[None, :]
    a_ok = a < W_a
    rows = (tl.program_id(0) // n_blocks)
    p_x_row = p_x + rows * s_x_0
    p_label_row = p_label + rows * s_label_0
    p_lse_row = p_lse + rows * s_lse_0
    p_g_loss_row = p_g_loss + rows * s_g_loss_0
    p_d_x_row = p_d_x + rows * s_d_x_0
    b_x = tl.load(p_x_row + a, mask=a_ok, other=0.0).to(tl.float32)
    b_label = tl.load(p_label_row + unit)
    v3 = b_label != -100
    v5 = tl.where(v3, b_label, tl.full((1, 1), 0, tl.int64))
    b_lse = tl.load(p_lse_row + unit)
    v8 = (a == tl.where((v5 >= 0) & (v5 < W_a), v5, -1).to(a.dtype))
    b_g_loss = tl.load(p_g_loss_row + unit)
    v11 = tl.where(v3, b_g_loss, tl.full((1, 1), 0.0, tl.float32))
    v12 = -v11
    v13 = tl.where(v8, v12, tl.full((1, 1), 0.0, tl.float32))
    v14 = b_x - b_lse
    v15 = device.quick_exp(v14)
    v16 = v11 * v15
    v17 = v13 + v16
    tl.store(p_d_x_row + a, device.round_to(v17, tl.bfloat16), mask=a_ok)
