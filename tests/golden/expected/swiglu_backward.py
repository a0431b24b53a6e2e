"""A row program

Written by fxfuse: schedule "tiled" (a program instance maps a block of columns of some rows), for the row program

    program rank=1 math=float32
    axis a = ?
    arg gate : bfloat16[r|a]
    arg up : bfloat16[r|a]
    arg g_y : bfloat16[r|a]
    %0 = load gate a 0 1
    %1 = load up a 0 1
    %2 = sigmoid %0
    %3 = mul %0 %2
    %4 = cast bfloat16 %3
    %5 = load g_y a 0 1
    %6 = mul %5 %1
    %7 = mul %5 %4
    %8 = mul %6 %2
    %9 = mul %6 %0
    %10 = const 1.0
    %11 = sub %10 %2
    %12 = mul %9 %2
    %13 = mul %12 %11
    %14 = add %8 %13
    out d_gate : bfloat16[r|a] = %14 @ a 0 1
    out d_up : bfloat16[r|a] = %7 @ a 0 1
"""

import triton
import triton.language as tl

from fxfuse.kernels import device


@triton.jit(do_not_specialize=[])
def kernel(
    p_gate, p_up, p_g_y, p_d_gate, p_d_up, W_a, B_a: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):
    unit = tl.zeros((1, 1), tl.int32)
    n_blocks = tl.cdiv(W_a, B_a)
    start = (tl.program_id(0)) * B_a
    a = start + tl.arange(0, B_a)[None, :]
    b_gate = tl.load(p_gate + a).to(tl.float32)
    b_up = tl.load(p_up + a).to(tl.float32)
    v2 = device.sigmoid(b_gate)
    v3 = b_gate * v2
    v4 = device.round_to(v3, tl.bfloat16).to(tl.float32)
    b_g_y = tl.load(p_g_y + a).to(tl.float32)
    v6 = b_g_y * b_up
    v7 = b_g_y * v4
    v8 = v6 * v2
    v9 = v6 * b_gate
    v11 = 1.0 - v2
    v12 = v9 * v2
    v13 = v12 * v11
    v14 = v8 + v13
    tl.store(p_d_gate + a, device.round_to(v14, tl.bfloat16))
    tl.store(p_d_up + a, device.round_to(v7, tl.bfloat16))
