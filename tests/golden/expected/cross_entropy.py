"""A row program

Written by fxfuse: schedule "looped" (a program instance walks one row in blocks, once for each reduction that waits for another), for the row program

    program rank=1 math=float32
    axis a = ?
    arg x : bfloat16[r|a]
    arg label : int64[r|]
    %0 = load x a 0 1
    %1 = load label None
    %2 = const -100
    %3 = ne %1 %2
    %4 = const 0
    %5 = select %3 %1 %4
    %6 = check_index a %5
    %7 = logsumexp a %0
    %8 = iota a
    %9 = eq %8 %6
    %10 = const 0.0
    %11 = select %9 %0 %10
    %12 = sum a %11
    %13 = sub %7 %12
    %14 = select %3 %13 %10
    out loss : float32[r|] = %14
    out lse : float32[r|] = %7
"""

import triton
import triton.language as tl

from fxfuse.kernels import device


@triton.jit(do_not_specialize=["n_rows", "s_label_0", "s_loss_0", "s_lse_0"])
def kernel(
    p_x, p_label, p_loss, p_lse, s_x_0, s_label_0, s_loss_0, s_lse_0, n_rows, W_a, B_a: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr,
):
    unit = tl.zeros((1, 1), tl.int32)
    rows = tl.program_id(0)
    p_x_row = p_x + rows * s_x_0
    p_label_row = p_label + rows * s_label_0
    p_loss_row = p_loss + rows * s_loss_0
    p_lse_row = p_lse + rows * s_lse_0
    b_label = tl.load(p_label_row + unit)
    v3 = b_label != -100
    v5 = tl.where(v3, b_label, tl.full((1, 1), 0, tl.int64))
    tl.device_assert((v5 >= 0) & (v5 < W_a), "index out of range of axis a")
    at12_ok = (v5 >= 0) & (v5 < W_a)
    at12 = tl.where(at12_ok, v5, 0)
    b_x_at12 = tl.load(p_x_row + at12, mask=at12_ok, other=0.0).to(tl.float32)
    v12 = tl.where(at12_ok, b_x_at12, 0.0)
    peak7 = tl.full((1, 1), float("-inf"), tl.float32)
    total7 = tl.full((1, B_a), 0.0, tl.float32)
    for start in tl.range(0, W_a // B_a * B_a, B_a, num_stages=STAGES):
        a_a0 = start + tl.arange(0, B_a)[None, :]
        b_x_a0 = tl.load(p_x_row + a_a0).to(tl.float32)
        peak7, total7 = device.online_logsumexp(peak7, total7, b_x_a0)
    tail = W_a // B_a * B_a
    a_a0_tail = tail + tl.arange(0, B_a)[None, :]
    a_ok_a0_tail = a_a0_tail < W_a
    b_x_a0_tail = tl.load(p_x_row + a_a0_tail, mask=a_ok_a0_tail, other=0.0).to(tl.float32)
    peak7, total7 = device.online_logsumexp(peak7, total7, tl.where(a_ok_a0_tail, b_x_a0_tail, float("-inf")))
    v7 = device.finish_logsumexp(peak7, total7)
    v13 = v7 - v12
    v14 = tl.where(v3, v13, tl.full((1, 1), 0.0, tl.float32))
    tl.store(p_loss_row + unit, v14)
    tl.store(p_lse_row + unit, v7)
