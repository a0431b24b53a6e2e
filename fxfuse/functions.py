"""The pointwise functions a row program may apply, each with its mathematics and its two lowerings.

A function is *opaque and stable*: its derivative is known to sympy in terms of itself (``sigmoid' = s * (1 - s)``), never in
terms of expanded exponentials, which overflow (``exp(1000) / (1 + exp(1000))`` is NaN in float32).

To add one: write the sympy class if sympy has none (with ``fdiff``), and add one line to the table. The canonical vocabulary, the
regions, the derivation and its tests read the table (docs/writing_a_rule.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import sympy
import torch
from torch import Tensor

Kind = Literal["real", "int", "bool"]


class Sigmoid(sympy.Function):
    """1 / (1 + exp(-x))."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return self * (1 - self)

    def _latex(self, printer: Any, exp: str | None = None) -> str:
        return _power(rf"\sigma\left({printer._print(self.args[0])}\right)", exp)


class Softplus(sympy.Function):
    """log(1 + exp(x))."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return Sigmoid(self.args[0])


class Log1p(sympy.Function):
    """log(1 + x)."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return 1 / (1 + self.args[0])


class Expm1(sympy.Function):
    """exp(x) - 1."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return self + 1


class Relu(sympy.Function):
    """max(x, 0), whose derivative at 0 is 0 and at NaN 1, as in torch."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return Select(compare("le", self, sympy.Integer(0)), sympy.Integer(0), sympy.Integer(1))


class Absolute(sympy.Function):
    """|x|, whose derivative at 0 is 0 as in torch."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return Sign(self.args[0])


class Sign(sympy.Function):
    """-1, 0 or 1."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return sympy.Integer(0)


class ClampMin(sympy.Function):
    """max(x, bound) for a constant bound; the derivative at the bound is 1 as in torch.clamp."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        x, bound = self.args
        if argindex != 1:
            return Indicator(sympy.StrictLessThan(x, bound, evaluate=False))
        return Indicator(sympy.GreaterThan(x, bound, evaluate=False))


class ClampMax(sympy.Function):
    """min(x, bound) for a constant bound; the derivative at the bound is 1 as in torch.clamp."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        x, bound = self.args
        if argindex != 1:
            return Indicator(sympy.StrictGreaterThan(x, bound, evaluate=False))
        return Indicator(sympy.LessThan(x, bound, evaluate=False))


class Maximum(sympy.Function):
    """Elementwise maximum of two values; a tie shares the cotangent equally, as in torch.maximum."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        a, b = self.args if argindex == 1 else reversed(self.args)
        return _tie_shared(compare("lt", a, b), a, b)


class Minimum(sympy.Function):
    """Elementwise minimum of two values; a tie shares the cotangent equally, as in torch.minimum."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        a, b = self.args if argindex == 1 else reversed(self.args)
        return _tie_shared(compare("gt", a, b), a, b)


class Select(sympy.Function):
    """``a`` where the condition (an opaque truth value) holds, else ``b``."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        condition = self.args[0]
        if argindex == 2:
            return Select(condition, sympy.Integer(1), sympy.Integer(0))
        if argindex == 3:
            return Select(condition, sympy.Integer(0), sympy.Integer(1))
        return sympy.Integer(0)


class Compare(sympy.Function):
    """An opaque comparison ``Compare(relation, a, b)`` with relation in {lt, le, gt, ge, eq, ne}; derivative 0."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return sympy.Integer(0)


class Logical(sympy.Function):
    """An opaque ``and``, ``or``, ``not`` of truth values; derivative 0."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return sympy.Integer(0)


class Magnitude(sympy.Function):
    """sqrt(x) of a sum of squares. Its derivative at 0 is 0, as that of a norm in torch; the square root's own is infinite."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return Select(compare("eq", self, sympy.Integer(0)), sympy.Integer(0), 1 / (2 * self))


class Stop(sympy.Function):
    """x, taken as a constant: where a result does not depend on it (the shift of a softmax), its derivative is not followed."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return sympy.Integer(0)


class Round(sympy.Function):
    """``Round(dtype, x)``: x rounded to a narrower dtype. Its derivative is 1: rounding is not differentiated."""

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return sympy.Integer(1) if argindex == 2 else sympy.Integer(0)


_RELATION_NAMES = {
    sympy.StrictGreaterThan: "gt",
    sympy.GreaterThan: "ge",
    sympy.StrictLessThan: "lt",
    sympy.LessThan: "le",
}


def compare(relation: str, a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    """The opaque truth value of ``a <relation> b``."""
    return Compare(sympy.Symbol(relation), a, b)


def Indicator(relation: Any) -> sympy.Expr:
    """1 where the relation holds, else 0."""
    condition = compare(_RELATION_NAMES[type(relation)], *relation.args)
    return Select(condition, sympy.Integer(1), sympy.Integer(0))


def _tie_shared(loses: sympy.Expr, a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    """Where one of them is NaN neither loses, and each has the whole cotangent."""
    half_on_tie = Select(compare("eq", a, b), sympy.Rational(1, 2), sympy.Integer(1))
    return Select(loses, sympy.Integer(0), half_on_tie)


def _power(text: str, exponent: str | None) -> str:
    return text if exponent is None else rf"{text}^{{{exponent}}}"


@dataclass(frozen=True)
class PointwiseFunction:
    """One row of the table.

    symbolic: builds the sympy expression of the result from those of the operands.
    eager:    the torch lowering, exact on float64, on any device.
    triton:   the Triton lowering, a format string over operands in registers (math dtype float32 or float64); ``device`` is
              fxfuse.kernels.device.
    result:   kind of the result; "same" takes the kind of the last operand.
    """

    name: str
    arity: int
    symbolic: Callable[..., sympy.Expr]
    eager: Callable[..., Tensor]
    triton: str
    result: Literal["real", "int", "bool", "same"] = "real"

    @property
    def is_torchs(self) -> bool:
        """Is it what ``torch.<name>`` computes of one tensor: a graph may then hold it under this name."""
        return self.arity == 1 and self.eager is getattr(torch, self.name, None)


def _relation(name: str, symbol: str, eager: Callable[..., Tensor]) -> PointwiseFunction:
    return PointwiseFunction(name, 2, lambda a, b: compare(name, a, b), eager, f"{{0}} {symbol} {{1}}", "bool")


def _logical(name: str) -> Callable[..., sympy.Expr]:
    return lambda *operands: Logical(sympy.Symbol(name), *operands)


_TABLE = (
    PointwiseFunction("add", 2, lambda a, b: a + b, torch.add, "{0} + {1}", "same"),
    PointwiseFunction("sub", 2, lambda a, b: a - b, torch.sub, "{0} - {1}", "same"),
    PointwiseFunction("mul", 2, lambda a, b: a * b, torch.mul, "{0} * {1}", "same"),
    PointwiseFunction("div", 2, lambda a, b: a / b, torch.true_divide, "device.divide({0}, {1})"),
    PointwiseFunction("neg", 1, lambda a: -a, torch.neg, "-{0}", "same"),
    PointwiseFunction("pow", 2, lambda a, b: a**b, torch.pow, "device.pow({0}, {1})"),
    PointwiseFunction("square", 1, lambda a: a**2, lambda a: a * a, "{0} * {0}", "same"),
    PointwiseFunction("reciprocal", 1, lambda a: 1 / a, torch.reciprocal, "device.reciprocal({0})"),
    PointwiseFunction("sqrt", 1, sympy.sqrt, torch.sqrt, "device.sqrt({0})"),
    PointwiseFunction("rsqrt", 1, lambda a: a ** sympy.Rational(-1, 2), torch.rsqrt, "tl.rsqrt({0})"),
    PointwiseFunction("exp", 1, sympy.exp, torch.exp, "device.exp({0})"),
    PointwiseFunction("log", 1, sympy.log, torch.log, "device.log({0})"),
    PointwiseFunction("expm1", 1, Expm1, torch.expm1, "device.expm1({0})"),
    PointwiseFunction("log1p", 1, Log1p, torch.log1p, "device.log1p({0})"),
    PointwiseFunction("sin", 1, sympy.sin, torch.sin, "device.sin({0})"),
    PointwiseFunction("cos", 1, sympy.cos, torch.cos, "device.cos({0})"),
    PointwiseFunction("tanh", 1, sympy.tanh, torch.tanh, "device.tanh({0})"),
    PointwiseFunction("erf", 1, sympy.erf, torch.erf, "tl.erf({0})"),
    PointwiseFunction("sigmoid", 1, Sigmoid, torch.sigmoid, "device.sigmoid({0})"),
    PointwiseFunction("softplus", 1, Softplus, lambda a: torch.logaddexp(a, torch.zeros_like(a)),
                      "device.softplus({0})"),
    PointwiseFunction("relu", 1, Relu, torch.relu, "device.relu({0})"),
    PointwiseFunction("abs", 1, Absolute, torch.abs, "tl.abs({0})", "same"),
    PointwiseFunction("sign", 1, Sign, torch.sign, "device.sign({0})"),
    PointwiseFunction("clamp_min", 2, ClampMin, torch.maximum,
                      "device.maximum({0}, {1})"),
    PointwiseFunction("clamp_max", 2, ClampMax, torch.minimum,
                      "device.minimum({0}, {1})"),
    PointwiseFunction("maximum", 2, Maximum, torch.maximum,
                      "device.maximum({0}, {1})"),
    PointwiseFunction("minimum", 2, Minimum, torch.minimum,
                      "device.minimum({0}, {1})"),
    PointwiseFunction("magnitude", 1, Magnitude, torch.sqrt, "device.sqrt({0})"),
    PointwiseFunction("stop", 1, Stop, lambda a: a, "{0}", "same"),
    PointwiseFunction("select", 3, Select, torch.where, "tl.where({0}, {1}, {2})", "same"),
    _relation("lt", "<", torch.lt),
    _relation("le", "<=", torch.le),
    _relation("gt", ">", torch.gt),
    _relation("ge", ">=", torch.ge),
    _relation("eq", "==", torch.eq),
    _relation("ne", "!=", torch.ne),
    PointwiseFunction("and", 2, _logical("and"), torch.logical_and, "{0} & {1}", "bool"),
    PointwiseFunction("or", 2, _logical("or"), torch.logical_or, "{0} | {1}", "bool"),
    PointwiseFunction("not", 1, _logical("not"), torch.logical_not, "~{0}", "bool"),
    PointwiseFunction("real", 1, lambda a: a, lambda a: a, "{0}"),  # int or bool -> the program's math dtype
)

FUNCTIONS: dict[str, PointwiseFunction] = {function.name: function for function in _TABLE}
# By the sympy class that stands for them, so that what sympy makes of a derivative is found again.
FUNCTION_OF_CLASS: dict[type, str] = {f.symbolic: f.name for f in _TABLE if isinstance(f.symbolic, type) and f.symbolic is not Stop}


def is_as_written() -> bool:
    """Is the table that of this file, nothing added or replaced since: what a later process may take from this one depends on it."""
    return len(FUNCTIONS) == len(_TABLE) and all(FUNCTIONS.get(function.name) is function for function in _TABLE)
