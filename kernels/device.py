"""Device functions that generated kernels call: the table functions that Triton's language lacks or approximates.

On a GPU they are the vendor's math library (libdevice on NVIDIA, ocml on AMD), the very functions eager kernels call, so that a
float32 instance is as accurate as eager. Triton's interpreter has no such library: there each is written with what numpy offers.

Every function takes and returns float32 or float64 tensors, and lets NaN through.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def maximum(a, b):
    """The larger of two values; NaN if either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(a, b):
    """The smaller of two values; NaN if either is."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def let_next_kernel_start(early: tl.constexpr):
    """The next kernel of the stream may be set up while this one runs (compute capability 9.0 and above)."""
    if early:
        gdc_launch_dependents()


@triton.jit
def wait_for_earlier_kernel(early: tl.constexpr):
    """From here on everything that the kernel before wrote can be read."""
    if early:
        gdc_wait()


@triton.jit
def repeat_rows(a, rows: tl.constexpr):
    """a [R, B], of equal rows, as [rows, B]."""
    if a.shape[0] == rows:
        return a
    else:
        repeated = tl.broadcast_to(a[None, :, :], (rows // a.shape[0], a.shape[0], a.shape[1]))
        return tl.reshape(repeated, (rows, a.shape[1]))


@triton.jit
def divide(a, b):
    """a / b rounded to nearest (Triton's own ``/`` on float32 is off by up to 2 ulp)."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


if INTERPRETED.value:

    @triton.jit
    def divide_by_row(a, b, exact: tl.constexpr = True):
        return divide(a, b)

    @triton.jit
    def quotient(a, b):
        """a / b; 0 for b above 2^126, as on a GPU."""
        return tl.where(b > 2.0**126, 0.0, a / b)

else:

    @triton.jit
    def divide_by_row(a, b, exact: tl.constexpr = True):
        """a [R, B] / b [R, 1], within an ulp: one division a row, then a multiplication and, where exact, its correction an element.

        Rows are scaled so that the reciprocal of a b as small as the smallest number is finite. What the correction cannot take
        (infinities, zeros) is right without it.
        """
        if a.dtype == tl.float64:
            return a / b
        else:
            scale = tl.where(tl.abs(b) < 2.0**-100, 2.0**64, 1.0)
            b = b * scale
            inverse = tl.div_rn(tl.full(b.shape, 1.0, b.dtype), b)
            a, b, inverse = tl.broadcast(a * scale, b)[0], tl.broadcast(a, b)[1], tl.broadcast(a, inverse)[1]
            q = a * inverse
            if exact:
                better = tl.fma(tl.fma(-q, b, a), inverse, q)
                q = tl.where(better == better, better, q)
            return q

    @triton.jit
    def quotient(a, b):
        """a / b within 2 ulp, one instruction of the hardware and a multiplication; 0 for b above 2^126."""
        if a.dtype == tl.float64:
            return a / b
        else:
            return libdevice.fast_dividef(a, b)


@triton.jit
def reciprocal(a):
    return divide(tl.full(a.shape, 1.0, a.dtype), a)


@triton.jit
def relu(a):
    return maximum(a, tl.zeros(a.shape, a.dtype))


@triton.jit
def sign(a):
    """-1, 0 or 1; as in torch, 0 for NaN."""
    return (a > 0).to(a.dtype) - (a < 0).to(a.dtype)


@triton.jit
def sqrt(a):
    """The square root rounded to nearest."""
    if a.dtype == tl.float64:
        return tl.sqrt(a)
    else:
        return tl.sqrt_rn(a)


if INTERPRETED.value:

    @triton.jit
    def round_to(a, dtype: tl.constexpr):
        """To nearest even, by hand for bfloat16: the interpreter truncates."""
        if dtype == tl.bfloat16:
            single = a.to(tl.float32)
            bits = single.to(tl.uint32, bitcast=True)
            nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
            return tl.where(single != single, 0x7FC0, nearest).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        else:
            return a.to(dtype)

    @triton.jit
    def exp(a):
        """In float64: numpy's float32 exp is off by 2 ulp."""
        return tl.exp(a.to(tl.float64)).to(a.dtype)

    @triton.jit
    def quick_exp(a):
        return exp(a)

    @triton.jit
    def log(a):
        return tl.log(a)

    @triton.jit
    def sin(a):
        return tl.sin(a)

    @triton.jit
    def cos(a):
        return tl.cos(a)

    @triton.jit
    def expm1(a):
        """In float64; near 0 by its series."""
        a64 = a.to(tl.float64)
        series = a64 * (1.0 + a64 * (0.5 + a64 * (1.0 / 6.0 + a64 / 24.0)))
        return tl.where(tl.abs(a64) < 1e-3, series, tl.exp(a64) - 1.0).to(a.dtype)

    @triton.jit
    def log1p(a):
        """In float64, by the quotient that cancels the rounding of 1 + a: log(1 + a) * a / ((1 + a) - 1)."""
        a64 = a.to(tl.float64)
        u = 1.0 + a64
        return tl.where(u == 1.0, a64, tl.where(u == float("inf"), u, tl.log(u) * (a64 / (u - 1.0)))).to(a.dtype)

    @triton.jit
    def tanh(a):
        a64 = a.to(tl.float64)
        e = tl.exp(-2.0 * tl.abs(a64))
        series = a64 - a64 * a64 * a64 / 3.0
        far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(a64)) + 1.0)  # the nearest to 1, where 1 - tanh^2 is all that is left
        signed = tl.where(a64 < 0, -1.0, 1.0) * tl.where(tl.abs(a64) < 0.5, (1.0 - e) / (1.0 + e), far)
        return tl.where(tl.abs(a64) < 1e-4, series, signed).to(a.dtype)

    @triton.jit
    def pow(a, b):
        """|a|^b by logarithms in float64, with the signs and special values of C's pow."""
        a64, b64 = a.to(tl.float64), b.to(tl.float64)
        size = tl.exp(b64 * tl.log(tl.abs(a64)))
        whole = tl.floor(b64) == b64
        odd = tl.floor(b64 * 0.5) * 2.0 != b64
        signed = tl.where(a64 < 0, tl.where(whole, tl.where(odd, -size, size), float("nan")), size)
        return tl.where((b64 == 0.0) | (a64 == 1.0), 1.0, signed).to(a.dtype)

    @triton.jit
    def row_max(a):
        """The maximum of each row [R, 1]; NaN if the row holds one (numpy's nanmax, which the interpreter uses, drops it)."""
        nans = tl.sum((a != a).to(tl.int32), 1, keep_dims=True)
        return tl.where(nans > 0, float("nan"), tl.max(tl.where(a != a, float("-inf"), a), 1, keep_dims=True))

else:

    @triton.jit
    def round_to(a, dtype: tl.constexpr):
        """Rounded to a narrower type, to nearest even."""
        return a.to(dtype)

    @triton.jit
    def exp(a):
        return libdevice.exp(a)

    @triton.jit
    def quick_exp(a):
        """exp(a) as 2^(a log2(e)), one instruction after a multiplication: some |a| ulp off. For what is at most about 0, as a part of
        what holds an exp(0), and for what ends in 16 bits."""
        if a.dtype == tl.float64:
            return libdevice.exp(a)
        else:
            return tl.exp2(a * LOG2_E)

    @triton.jit
    def log(a):
        return libdevice.log(a)

    @triton.jit
    def sin(a):
        return libdevice.sin(a)

    @triton.jit
    def cos(a):
        return libdevice.cos(a)

    @triton.jit
    def expm1(a):
        return libdevice.expm1(a)

    @triton.jit
    def log1p(a):
        return libdevice.log1p(a)

    @triton.jit
    def tanh(a):
        """1 - 2 / (exp(2 |a|) + 1) with the sign of a; near 0, where that cancels, an odd polynomial (minimax below 0.55, 1.3 ulp).

        Both are computed: the vendor's function branches, and neighbours that differ wait for each other.
        """
        if a.dtype == tl.float64:
            return libdevice.tanh(a)
        else:
            size, square = tl.abs(a), a * a
            far = 1.0 - quotient(tl.full(a.shape, 2.0, a.dtype), tl.exp2(size * (2.0 * LOG2_E)) + 1.0)
            series = -0.3333294663590015 + square * (0.13320725044011367
                                                     + square * (-0.05267181287244882 + square * 0.016437580037986024))
            return tl.where(size < 0.55, a + a * square * series, tl.where(a < 0, -far, far))

    @triton.jit
    def pow(a, b):
        return libdevice.pow(a, b)

    @triton.jit
    def row_max(a):
        """The maximum of each row [R, 1]; NaN if the row holds one."""
        return tl.reduce(a, 1, maximum, keep_dims=True)


@triton.jit
def through_bfloat16(a):
    """A float32 rounded to bfloat16, as a float32: two in one instruction (a single one would go to a slow unit), then apart again.
    The first operand of the conversion is its upper half."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 both; cvt.rn.bf16x2.f32 both, $3, $2; shl.b32 $0, both, 16; and.b32 $1, both, 0xffff0000; }",
        "=f,=f,f,f", [a], dtype=tl.float32, is_pure=True, pack=2)


@triton.jit
def _add_2(a, b, c, d):
    return a + c, b + d


@triton.jit
def _add_3(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def sums_of_2(a, b):
    """The sums of each row [R, 1] of two values: the warps wait for one another once, not twice."""
    if INTERPRETED:
        return tl.sum(a, 1, keep_dims=True), tl.sum(b, 1, keep_dims=True)
    else:
        return tl.reduce((a, b), 1, _add_2, keep_dims=True)


@triton.jit
def sums_of_3(a, b, c):
    if INTERPRETED:
        return tl.sum(a, 1, keep_dims=True), tl.sum(b, 1, keep_dims=True), tl.sum(c, 1, keep_dims=True)
    else:
        return tl.reduce((a, b, c), 1, _add_3, keep_dims=True)


@triton.jit
def sigmoid(a):
    """1 / (1 + exp(-a)): 0 at -inf and 1 at +inf, never NaN but for NaN. The sum is kept finite, so that one Newton step of the
    reciprocal is within an ulp; above 2^126 the quotient is 0, and stays it."""
    if a.dtype == tl.float64:
        return 1.0 / (1.0 + exp(-a))
    else:
        total = 1.0 + tl.exp2(minimum(a * (-LOG2_E), tl.full(a.shape, 127.5, a.dtype)))
        inverse = quotient(tl.full(a.shape, 1.0, a.dtype), total)
        return tl.fma(tl.fma(-total, inverse, 1.0), inverse, inverse)


@triton.jit
def quick_erf(a):
    """The error function within 5e-7, not relative to it: for what a constant is added to. (Abramowitz and Stegun, 7.1.26.)"""
    if a.dtype == tl.float64:
        return tl.erf(a)
    else:
        t = quotient(tl.full(a.shape, 1.0, a.dtype), 1.0 + 0.3275911 * tl.abs(a))
        series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
        size = 1.0 - series * tl.exp2(a * a * (-LOG2_E))
        return tl.where(a < 0, -size, size)


@triton.jit
def softplus(a):
    """log(1 + exp(a)) without overflow."""
    return relu(a) + log1p(exp(-tl.abs(a)))


@triton.jit
def finite_or_zero(a):
    """0 where ``a`` is infinite: the shift under which a logsumexp of infinities is what torch's is."""
    return tl.where((a == float("inf")) | (a == float("-inf")), 0.0, a)


@triton.jit
def row_logsumexp(a):
    """log(sum(exp(a))) of each row [R, 1]; masked columns hold -inf. exp(a - m) is 2^((a - m) log2(e)), one instruction after a
    multiplication; the difference comes first, so that a row that one element dominates gives that element exactly."""
    peak = finite_or_zero(tl.max(a, 1, keep_dims=True))
    return log(tl.sum(tl.exp2((a - peak) * LOG2_E), 1, keep_dims=True)) + peak


@triton.jit
def online_logsumexp(peak, total, a):
    """One step of a logsumexp over blocks of columns: the row's maximum so far [R, 1], and its sum by position [R, B].

    ``total`` is relative to exp(peak); it is rescaled when the peak moves. Before the first block: -inf and 0.
    """
    higher = tl.maximum(peak, tl.max(a, 1, keep_dims=True))
    shift = finite_or_zero(higher)
    # Never above 1: a peak that became infinite leaves no shift, and 0 * inf would be NaN.
    rescale = tl.exp2(tl.minimum((peak - shift) * LOG2_E, 0.0))
    return higher, total * rescale + tl.exp2((a - shift) * LOG2_E)


@triton.jit
def finish_logsumexp(peak, total):
    """The logsumexp [R, 1] of what ``online_logsumexp`` saw."""
    return log(tl.sum(total, 1, keep_dims=True)) + finite_or_zero(peak)


@triton.jit
def online_peak(peak, a):
    """One step of maxima over blocks: those of groups of neighbouring columns so far [B / G, 1], and the next block [1, B].

    Returns the maxima with this block, then for every column [1, B]: that of its group, and the factor, at most 1, by which sums of
    exponentials shifted by the old one shrink. A maximum that is infinite shifts nothing.
    """
    higher = maximum(peak, row_max(tl.reshape(a, (peak.shape[0], a.shape[1] // peak.shape[0]))))
    shift = finite_or_zero(higher)
    less = tl.exp2(tl.minimum((peak - shift) * LOG2_E, 0.0))
    return higher, _of_columns(shift, a), _of_columns(less, a)


@triton.jit
def _of_columns(a, like):
    """Values of groups [B / G, 1] as values of columns [1, B]."""
    return tl.reshape(tl.broadcast_to(a, (a.shape[0], like.shape[1] // a.shape[0])), like.shape)


@triton.jit
def finish_online(total, peak, m):
    """The sum [1, 1] of sums by column [1, B], each shifted by the maximum of its group [B / G, 1], shifted by the row's maximum m.

    NaN if m is infinite, as exp(m - m) is."""
    less = exp(tl.minimum(finite_or_zero(peak) - finite_or_zero(m), 0.0))
    return tl.sum(total * _of_columns(less, total), 1, keep_dims=True) + (m - m)


# Triton's key of a kernel in its cache on disk names a constant of a function it calls only if that function's own key was computed
# before. Computed here, in this order, they make a kernel's key the same in every process, whatever was compiled there earlier.
KEYS = {name: value.cache_key for name, value in list(globals().items()) if isinstance(value, triton.JITFunction)}
