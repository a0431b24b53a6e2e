"""The kernel of nf4.py, which launches it. (Nothing here imports torch: see compile_worker.py.)"""

from __future__ import annotations

import triton
import triton.language as tl

from fxfuse.kernels.device import round_to

# How a nibble becomes a number.
TABLE = tl.constexpr(0)  # a load from the code's table, which stays in the L1 cache
SHUFFLE = tl.constexpr(1)  # from the lane of the warp that holds it (NVIDIA, on a device)
SELECT = tl.constexpr(2)  # a tree of selections


@triton.jit
def _nf4(index):
    """The number of an NF4 index."""
    b3, b2, b1, b0 = (index & 8) != 0, (index & 4) != 0, (index & 2) != 0, (index & 1) != 0
    e = tl.where(b0, 1.0, 0.7229568362236023)
    d = tl.where(b0, 0.5626170039176941, 0.44070982933044434)
    c = tl.where(b0, 0.33791524171829224, 0.24611230194568634)
    a = tl.where(b0, 0.16093020141124725, 0.07958029955625534)
    upper = tl.where(b2, tl.where(b1, e, d), tl.where(b1, c, a))
    e = tl.where(b0, 0.0, -0.09105003625154495)
    d = tl.where(b0, -0.18477343022823334, -0.28444138169288635)
    c = tl.where(b0, -0.39491748809814453, -0.5250730514526367)
    a = tl.where(b0, -0.6961928009986877, -1.0)
    return tl.where(b3, upper, tl.where(b2, tl.where(b1, e, d), tl.where(b1, c, a)))


@triton.jit
def _fp4(index):
    """The number of an FP4 index: a sign and one of eight magnitudes."""
    b2, b1, b0 = (index & 4) != 0, (index & 2) != 0, (index & 1) != 0
    upper = tl.where(b1, tl.where(b0, 0.25, 0.1666666716337204), tl.where(b0, 0.5, 0.3333333432674408))
    lower = tl.where(b1, tl.where(b0, 1.0, 0.6666666865348816), tl.where(b0, 0.0052083334885537624, 0.0))
    magnitude = tl.where(b2, upper, lower)
    return tl.where((index & 8) != 0, -magnitude, magnitude)


@triton.jit
def _code(index, IS_NF4: tl.constexpr):
    if IS_NF4:
        return _nf4(index)
    return _fp4(index)


@triton.jit
def _from_lane(index, IS_NF4: tl.constexpr):
    """Lane i of each half warp holds number i; a shuffle fetches it by the low four bits of the index."""
    lane = tl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r,r", [tl.zeros_like(index)], dtype=tl.int32, is_pure=True, pack=1)
    return tl.inline_asm_elementwise("shfl.sync.idx.b32 $0, $1, $2, 0x101f, 0xffffffff;", "=f,f,r", [_code(lane, IS_NF4), index],
                                     dtype=tl.float32, is_pure=True, pack=1)  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=("absmax", "absmax_8bit", "absmax_code", "absmax_offset", "table"))
def dequantize_kernel(packed, absmax, absmax_8bit, absmax_code, absmax_offset, table, out,
                      words, numbers, row_stride,
                      ROW_WORDS: tl.constexpr, NIBBLES: tl.constexpr, GROUP_SHIFT: tl.constexpr, NESTED: tl.constexpr,
                      IS_NF4: tl.constexpr, LOOKUP: tl.constexpr, WIDE: tl.constexpr, RAGGED: tl.constexpr,
                      UNROLL: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """``words`` of NIBBLES nibbles make ``numbers`` numbers; GROUP_SHIFT: log2 of the words that share a scale; ROW_WORDS: words
    of a row where rows lie ``row_stride`` apart, 0 where they lie end to end. RAGGED: the last word is not full."""
    instance = tl.program_id(0)
    if WIDE:
        instance = instance.to(tl.int64)
    unrolled = tl.arange(0, UNROLL)[:, None] * WIDTH
    # A word a thread, its neighbours in the neighbouring threads: so each thread's numbers are one store.
    word = tl.max_contiguous(instance * (UNROLL * WIDTH) + unrolled + tl.arange(0, WIDTH)[None, :], [1, 1])
    inside = word < words
    bits = tl.load(packed + word, mask=inside, other=0).to(tl.int32)
    group = word >> GROUP_SHIFT
    if NESTED:
        quantized = tl.load(absmax_8bit + group, mask=inside, other=0)
        outer = tl.load(absmax + (group >> 8), mask=inside, other=0.0)
        # Two roundings, as bitsandbytes makes them: the launch forbids a fused multiply-add.
        scale = tl.load(absmax_code + quantized) * outer + tl.load(absmax_offset)
    else:
        scale = tl.load(absmax + group, mask=inside, other=0.0)
    nibble = tl.arange(0, NIBBLES)[None, None, :]
    shifted = bits[:, :, None] >> (8 * (nibble // 2) + 4 - 4 * (nibble % 2))
    if LOOKUP == SHUFFLE:
        value = _from_lane(shifted, IS_NF4)
    elif LOOKUP == TABLE:
        value = tl.load(table + (shifted & 15))
    else:
        value = _code(shifted, IS_NF4)
    value = value * scale[:, :, None]
    place = word * NIBBLES
    if ROW_WORDS > 0:
        place = (word // ROW_WORDS) * row_stride + (word % ROW_WORDS) * NIBBLES
    mask = inside[:, :, None]
    if RAGGED:
        mask = mask & (word[:, :, None] * NIBBLES + nibble < numbers)
    tl.store(out + (place[:, :, None] + nibble), round_to(value, out.dtype.element_ty), mask=mask)
