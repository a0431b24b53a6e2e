"""A row program

Written by fxfuse: schedule "looped" (a program instance walks one row in blocks, once for each reduction that waits for another), for the row program

    program rank=1 math=float32
    axis a = ?
    arg x : bfloat16[r|a]
    arg label : int64[r|]
    arg w : bfloat16[1|a]
    %0 = load x a 0 1
    %1 = load label None
    %2 = load w a 0 1
    %3 = const -100
    %4 = ne %1 %3
    %5 = const 0
    %6 = select %4 %1 %5
    %7 = check_index a %6
    %8 = max a %0
    %9 = stop %8
    %10 = sub %0 %9
    %11 = exp %10
    %12 = sum a %11
    %13 = iota a
    %14 = eq %13 %7
    %15 = const 0.0
    %16 = select %14 %10 %15
    %17 = sum a %16
    %18 = log %12
    %19 = sub %18 %17
    %20 = select %4 %19 %15
    %21 = mul %11 %2
    %22 = sum a %21
    out loss : float32[r|] = %20
    out peak : float32[r|] = %8
    out total : float32[r|] = %12
    out weighted : float32[r|] = %22
"""

import triton
import triton.language as tl

from fxfuse.kernels import device


@triton.jit(do_not_specialize=["n_rows", "s_label_0", "s_loss_0", "s_peak_0", "s_total_0", "s_weighted_0"])
def kernel(
    p_x, p_label, p_w, p_loss, p_peak, p_total, p_weighted, s_x_0, s_label_0, s_loss_0, s_peak_0, s_total_0,
    s_weighted_0, n_rows, W_a, B_a: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):
    unit = tl.zeros((1, 1), tl.int32)
    rows = tl.program_id(0)
    p_x_row = p_x + rows * s_x_0
    p_label_row = p_label + rows * s_label_0
    p_loss_row = p_loss + rows * s_loss_0
    p_peak_row = p_peak + rows * s_peak_0
    p_total_row = p_total + rows * s_total_0
    p_weighted_row = p_weighted + rows * s_weighted_0
    b_label = tl.load(p_label_row + unit)
    v4 = b_label != -100
    v6 = tl.where(v4, b_label, tl.full((1, 1), 0, tl.int64))
    tl.device_assert((v6 >= 0) & (v6 < W_a), "index out of range of axis a")
    peak8 = tl.full(((B_a + 7) // 8, 1), float("-inf"), tl.float32)
    total12 = tl.full((1, B_a), 0.0, tl.float32)
    total22 = tl.full((1, B_a), 0.0, tl.float32)
    for start in tl.range(0, W_a // B_a * B_a, B_a, num_stages=STAGES):
        a_a0 = start + tl.arange(0, B_a)[None, :]
        b_x_a0 = tl.load(p_x_row + a_a0).to(tl.float32)
        peak8, shift8, less8 = device.online_peak(peak8, b_x_a0)
        b_w_a0 = tl.load(p_w + a_a0).to(tl.float32)
        v10_a0 = b_x_a0 - shift8
        v11_a0 = device.quick_exp(v10_a0)
        v21_a0 = v11_a0 * b_w_a0
        total12 = total12 * less8 + v11_a0
        total22 = total22 * less8 + v21_a0
    tail = W_a // B_a * B_a
    a_a0_tail = tail + tl.arange(0, B_a)[None, :]
    a_ok_a0_tail = a_a0_tail < W_a
    b_x_a0_tail = tl.load(p_x_row + a_a0_tail, mask=a_ok_a0_tail, other=0.0).to(tl.float32)
    peak8, shift8, less8 = device.online_peak(peak8, tl.where(a_ok_a0_tail, b_x_a0_tail, float("-inf")))
    b_w_a0_tail = tl.load(p_w + a_a0_tail, mask=a_ok_a0_tail, other=0.0).to(tl.float32)
    v10_a0_tail = b_x_a0_tail - shift8
    v11_a0_tail = device.quick_exp(v10_a0_tail)
    v21_a0_tail = v11_a0_tail * b_w_a0_tail
    total12 = total12 * less8 + tl.where(a_ok_a0_tail, v11_a0_tail, 0.0)
    total22 = total22 * less8 + tl.where(a_ok_a0_tail, v21_a0_tail, 0.0)
    v8 = device.row_max(tl.reshape(peak8, (1, peak8.shape[0])))
    v12 = device.finish_online(total12, peak8, v8)
    v22 = device.finish_online(total22, peak8, v8)
    at17_ok = (v6 >= 0) & (v6 < W_a)
    at17 = tl.where(at17_ok, v6, 0)
    b_x_at17 = tl.load(p_x_row + at17, mask=at17_ok, other=0.0).to(tl.float32)
    v10_at17 = b_x_at17 - v8
    v17 = tl.where(at17_ok, v10_at17, 0.0)
    v18 = device.log(v12)
    v19 = v18 - v17
    v20 = tl.where(v4, v19, tl.full((1, 1), 0.0, tl.float32))
    tl.store(p_loss_row + unit, v20)
    tl.store(p_peak_row + unit, v8)
    tl.store(p_total_row + unit, v12)
    tl.store(p_weighted_row + unit, v22)
