"""What each canonical operation is to a region, and how its value is built in a row program.

A builder function receives the region's ``RowBuilder`` (see build.py), the lane of columns that is asked for, and the node's own
arguments; it returns the SSA value. Numbers in the graph become constants of the program.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..functions import FUNCTIONS

if TYPE_CHECKING:
    from .build import RowBuilder

aten = torch.ops.aten

PERMUTE = aten.permute.default
UNSQUEEZE = aten.unsqueeze.default
SQUEEZE = aten.squeeze.dim
RESHAPE = aten.reshape.default
SLICE = aten.slice.Tensor
STACK = aten.stack.default
CAT = aten.cat.default
REPEAT = aten.repeat_interleave.self_int
CAST = aten.to.dtype  # not prims.convert_element_type: it has no autograd formula
CROSS_ENTROPY = aten.cross_entropy_loss.default
GATHER = aten.gather.default

Value = int
Builder = Callable[..., Value]


def _unary(name: str) -> Builder:
    return lambda rows, lane, x: rows.apply(name, rows.real(x, lane))


def _binary(name: str) -> Builder:
    return lambda rows, lane, a, b: rows.apply(name, rows.real(a, lane), rows.real(b, lane))


def _compare(name: str) -> Builder:
    return lambda rows, lane, a, b: rows.apply(name, *rows.comparable(a, b, lane))


def _logical(name: str) -> Builder:
    return lambda rows, lane, *operands: rows.apply(name, *(rows.truth(x, lane) for x in operands))


def _power(rows: RowBuilder, lane: Any, x: Any, exponent: float) -> Value:
    base = rows.real(x, lane)
    if exponent == 1:
        return base
    if exponent == 3:
        return rows.apply("mul", rows.apply("square", base), base)
    if exponent == 4:
        return rows.apply("square", rows.apply("square", base))
    named = {2: "square", 0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}.get(exponent)
    return rows.apply(named, base) if named else rows.apply("pow", base, rows.const(float(exponent)))


def _silu(rows: RowBuilder, lane: Any, x: Any) -> Value:
    value = rows.real(x, lane)
    return rows.apply("mul", value, rows.apply("sigmoid", value))


def _gelu(rows: RowBuilder, lane: Any, x: Any, approximate: str = "none") -> Value:
    value = rows.real(x, lane)
    if approximate == "tanh":
        cube = rows.apply("mul", rows.apply("square", value), value)
        inner = rows.apply("add", value, rows.apply("mul", rows.const(0.044715), cube))
        bent = rows.apply("tanh", rows.apply("mul", rows.const(math.sqrt(2.0 / math.pi)), inner))
    else:
        bent = rows.apply("erf", rows.apply("mul", value, rows.const(math.sqrt(0.5))))
    return rows.apply(
        "mul", rows.apply("mul", rows.const(0.5), value), rows.apply("add", rows.const(1.0), bent)
    )


def _softplus(rows: RowBuilder, lane: Any, x: Any, beta: float = 1.0, threshold: float = 20.0) -> Value:
    scaled = (
        rows.real(x, lane) if beta == 1 else rows.apply("mul", rows.real(x, lane), rows.const(float(beta)))
    )
    result = rows.apply("softplus", scaled)
    return result if beta == 1 else rows.apply("div", result, rows.const(float(beta)))


def _clamp(rows: RowBuilder, lane: Any, x: Any, low: Any = None, high: Any = None) -> Value:
    value = rows.real(x, lane)
    if low is not None:
        value = rows.apply("clamp_min", value, rows.real(low, lane))
    if high is not None:
        value = rows.apply("clamp_max", value, rows.real(high, lane))
    return value


def _where(rows: RowBuilder, lane: Any, condition: Any, a: Any, b: Any) -> Value:
    return rows.apply("select", rows.truth(condition, lane), rows.real(a, lane), rows.real(b, lane))


def _cast(rows: RowBuilder, lane: Any, x: Any, dtype: torch.dtype, *flags: Any) -> Value:
    return rows.cast(dtype, rows.real(x, lane))


POINTWISE: dict[Any, Builder] = {
    aten.add.Tensor: _binary("add"),
    aten.sub.Tensor: _binary("sub"),
    aten.mul.Tensor: _binary("mul"),
    aten.div.Tensor: _binary("div"),
    aten.maximum.default: _binary("maximum"),
    aten.minimum.default: _binary("minimum"),
    aten.pow.Tensor_Scalar: _power,
    **{getattr(aten, f.name).default: _unary(f.name) for f in FUNCTIONS.values() if f.is_torchs},
    aten.silu.default: _silu,
    aten.gelu.default: _gelu,
    aten.softplus.default: _softplus,
    aten.clamp.default: _clamp,
    aten.where.self: _where,
    aten.where.ScalarSelf: _where,
    aten.where.ScalarOther: _where,
    CAST: _cast,
    **{
        getattr(getattr(aten, name), kind): _compare(name)
        for name in ("lt", "le", "gt", "ge", "eq", "ne")
        for kind in ("Tensor", "Scalar")
    },
    aten.logical_and.default: _logical("and"),
    aten.logical_or.default: _logical("or"),
    aten.logical_not.default: _logical("not"),
}

# A lone one of these is worth a kernel: recomputing it in the backward frees its output.
ACTIVATIONS = frozenset(
    {
        aten.silu.default,
        aten.gelu.default,
        aten.relu.default,
        aten.softplus.default,
        aten.tanh.default,
        aten.sigmoid.default,
    }
)
SELECTIONS = frozenset({aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther})
TRUTH_VALUED = frozenset(
    target
    for target in POINTWISE
    if str(target).split(".")[1]
    in ("lt", "le", "gt", "ge", "eq", "ne", "logical_and", "logical_or", "logical_not")
)


def _sum(rows: RowBuilder, x: Any) -> Value:
    return rows.row_sum(lambda lane: rows.real(x, lane), x)


def _mean(rows: RowBuilder, x: Any) -> Value:
    return rows.apply("div", _sum(rows, x), rows.width(x))


def _amax(rows: RowBuilder, x: Any) -> Value:
    return rows.whole_row("max", x)


def _logsumexp(rows: RowBuilder, x: Any) -> Value:
    return rows.whole_row("logsumexp", x)


def _variance(rows: RowBuilder, x: Any, correction: float) -> Value:
    mean = _mean(rows, x)
    squares = rows.row_sum(lambda lane: rows.apply("square", rows.apply("sub", rows.real(x, lane), mean)), x)
    count = (
        rows.width(x) if correction == 0 else rows.apply("sub", rows.width(x), rows.const(float(correction)))
    )
    return rows.apply("div", squares, count)


def _euclidean_norm(rows: RowBuilder, x: Any) -> Value:
    return rows.apply("magnitude", rows.row_sum(lambda lane: rows.apply("square", rows.real(x, lane)), x))


def _element(rows: RowBuilder, x: Any, dim: int, index: Any) -> Value:
    """The element of a row at an index of its own."""
    axis = rows.whole_axis(x)
    at = rows.builder.check_index(axis, rows.integer(index))
    hit = rows.apply("eq", rows.builder.iota(axis), at)
    return rows.builder.reduce("sum", axis, rows.apply("select", hit, rows.real(x, rows.whole_lane(x)), rows.const(0.0)))


REDUCTIONS: dict[Any, Callable[..., Value]] = {
    aten.sum.dim_IntList: lambda rows, x, dims, *keep: _sum(rows, x),
    aten.mean.dim: lambda rows, x, dims, *keep: _mean(rows, x),
    aten.amax.default: lambda rows, x, dims, *keep: _amax(rows, x),
    aten.logsumexp.default: lambda rows, x, dims, *keep: _logsumexp(rows, x),
    aten.var.dim: lambda rows, x, dims, unbiased, *keep: _variance(rows, x, int(unbiased)),
    aten.linalg_vector_norm.default: lambda rows, x, order, dims, *keep: _euclidean_norm(rows, x),
    GATHER: _element,
}


def _rms_norm(
    rows: RowBuilder, lane: Any, x: Any, shape: Any, weight: Any = None, eps: float | None = None
) -> Value:
    if eps is None:
        eps = torch.finfo(torch.float64 if rows.math == "float64" else torch.float32).eps
    squares = rows.row_sum(lambda piece: rows.apply("square", rows.real(x, piece)), x)
    rstd = rows.apply("rsqrt", rows.apply("add", rows.apply("div", squares, rows.width(x)), rows.const(eps)))
    normed = rows.apply("mul", rows.real(x, lane), rstd)
    return normed if weight is None else rows.apply("mul", normed, rows.real(weight, lane))


def _layer_norm(
    rows: RowBuilder, lane: Any, x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Value:
    mean = _mean(rows, x)
    variance = _variance(rows, x, 0)
    rstd = rows.apply("rsqrt", rows.apply("add", variance, rows.const(eps)))
    value = rows.apply("mul", rows.apply("sub", rows.real(x, lane), mean), rstd)
    if weight is not None:
        value = rows.apply("mul", value, rows.real(weight, lane))
    return value if bias is None else rows.apply("add", value, rows.real(bias, lane))


def _softmax(rows: RowBuilder, lane: Any, x: Any, dim: int, dtype: torch.dtype | None = None) -> Value:
    exponential = rows.apply("exp", _shifted(rows, lane, x))
    return rows.apply("div", exponential, _total_exponential(rows, x))


def _log_softmax(rows: RowBuilder, lane: Any, x: Any, dim: int, dtype: torch.dtype | None = None) -> Value:
    return rows.apply("sub", _shifted(rows, lane, x), rows.apply("log", _total_exponential(rows, x)))


def _shifted(rows: RowBuilder, lane: Any, x: Any) -> Value:
    """``x - max(x)``. Differences are taken before anything else, as torch takes them: the logarithm of a sum of exponentials
    is as large as the scores, and what is left of a difference from it is rounding."""
    return rows.apply("sub", rows.real(x, lane), rows.apply("stop", _amax(rows, x)))


def _total_exponential(rows: RowBuilder, x: Any) -> Value:
    exponential = rows.apply("exp", _shifted(rows, rows.whole_lane(x), x))
    return rows.builder.reduce("sum", rows.whole_axis(x), exponential)


def token_losses(rows: RowBuilder, logits: Any, labels: Any, ignore_index: int, smoothing: float) -> tuple[Value, Value]:
    """Cross-entropy of every row, ``log(sum(exp(z))) - z[label]``, 0 where the label is ``ignore_index``; and whether it counts.

    With smoothing e: ``(1 - e) * (log(sum(exp(z))) - z[label]) + e * (log(sum(exp(z))) - mean(z))``, as torch defines it.
    """
    axis = rows.whole_axis(logits)
    label = rows.integer(labels)
    counted = rows.apply("ne", label, rows.const(ignore_index))
    index = rows.builder.check_index(axis, rows.apply("select", counted, label, rows.const(0)))
    shifted = _shifted(rows, rows.whole_lane(logits), logits)
    log_total = rows.apply("log", _total_exponential(rows, logits))
    hit = rows.apply("eq", rows.builder.iota(axis), index)
    picked = rows.builder.reduce("sum", axis, rows.apply("select", hit, shifted, rows.const(0.0)))
    loss = rows.apply("sub", log_total, picked)
    if smoothing:
        mean = rows.apply("div", rows.builder.reduce("sum", axis, shifted), rows.width(logits))
        loss = rows.apply(
            "add",
            rows.apply("mul", rows.const(1.0 - smoothing), loss),
            rows.apply("mul", rows.const(float(smoothing)), rows.apply("sub", log_total, mean)),
        )
    return (
        rows.apply("select", counted, loss, rows.const(0.0)),
        rows.apply("select", counted, rows.const(1.0), rows.const(0.0)),
    )


# Operations of several row-program values, kept whole by the canonical graph.
ROW_MACROS: dict[Any, Builder | None] = {
    aten.rms_norm.default: _rms_norm,
    aten.layer_norm.default: _layer_norm,
    aten.softmax.int: _softmax,
    aten.log_softmax.int: _log_softmax,
    CROSS_ENTROPY: None,
}
CONCATENATIONS = frozenset({CAT, REPEAT})
VIEWS = frozenset({PERMUTE, UNSQUEEZE, SQUEEZE, RESHAPE})
