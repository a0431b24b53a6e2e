"""Readers of pointwise spellings: operators, Tensor methods, ``torch.*`` and ``F.*`` functions, aten overloads."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import SymFloat, SymInt
from torch.fx import Node

from .builder import Builder, Leave
from .facts import tensor_of, value_of
from .vocabulary import ARITHMETIC, RELATIONS, UNARY, aten, spelling


def _read_unary(name: str) -> None:
    aliases = {"neg": ("negative", "__neg__"), "abs": ("absolute", "__abs__"), "sigmoid": ("expit",)}
    functions = (abs,) if name == "abs" else ()

    @spelling(name, *aliases.get(name, ()), functions=functions)
    def read(b: Builder, input: Node, inplace: bool = False) -> Node:
        if inplace or not real(b, input):
            raise Leave("not a plain pointwise operation")
        return b.finish(UNARY[name], input)


for _name in UNARY:
    if _name != "logical_not":
        _read_unary(_name)


def real(b: Builder, x: Any) -> bool:
    """Is an operand a tensor of real numbers or integers (complex arithmetic has its own reader)."""
    return not b.tensor(x).is_complex()


def number(x: Any) -> bool:
    """Is an operand a number: a Python one, or a node that gives a symbolic one."""
    if isinstance(x, Node):
        return isinstance(value_of(x), (int, float, SymInt, SymFloat))
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _operands(b: Builder, *operands: Any) -> None:
    """At least one tensor, none complex; the others numbers."""
    tensors = [x for x in operands if tensor_of(x) is not None]
    if not tensors or not all(real(b, x) for x in tensors):
        raise Leave("no real tensor among the operands")
    if not all(number(x) or x in tensors for x in operands):
        raise Leave("an operand is neither tensor nor number")


@spelling("add", "__add__", "__radd__")
def add(b: Builder, input: Any, other: Any, alpha: Any = 1) -> Node:
    return _commutative(b, "add", input, other) if alpha == 1 else _unfused_scale(alpha)


@spelling("mul", "multiply", "__mul__", "__rmul__")
def mul(b: Builder, input: Any, other: Any) -> Node:
    return _commutative(b, "mul", input, other)


@spelling("sub", "subtract", "__sub__")
def sub(b: Builder, input: Any, other: Any, alpha: Any = 1) -> Node:
    _operands(b, input, other)
    return b.finish(ARITHMETIC["sub"], input, other) if alpha == 1 else _unfused_scale(alpha)


@spelling("rsub", "__rsub__")
def rsub(b: Builder, input: Any, other: Any, alpha: Any = 1) -> Node:
    return sub(b, other, input, alpha)


@spelling("div", "divide", "true_divide", "truediv", "__truediv__")
def div(b: Builder, input: Any, other: Any, rounding_mode: str | None = None) -> Node:
    _operands(b, input, other)
    if rounding_mode is not None:
        raise Leave("integer division")
    if number(input):
        return _over(b, input, other)
    return b.finish(ARITHMETIC["div"], input, other)


@spelling("__rtruediv__", "__rdiv__")
def rdiv(b: Builder, input: Any, other: Any) -> Node:
    return div(b, other, input)


def _over(b: Builder, numerator: Any, x: Node) -> Node:
    """``numerator / x`` as torch computes it: ``reciprocal(x) * numerator``, two roundings."""
    if numerator == 1:
        return b.finish(UNARY["reciprocal"], x)
    expected = b.expected().dtype
    return b.finish(ARITHMETIC["mul"], b.call(UNARY["reciprocal"], b.cast(x, expected)), numerator)


def _commutative(b: Builder, name: str, input: Any, other: Any) -> Node:
    """A number comes second."""
    _operands(b, input, other)
    if number(input):
        input, other = other, input
    return b.finish(ARITHMETIC[name], input, other)


def _unfused_scale(alpha: Any) -> Node:
    raise Leave(f"a + {alpha} * b rounds once, which no two operations do")


@spelling("pow", "__pow__")
def pow(b: Builder, input: Node, exponent: Any) -> Node:
    if not isinstance(exponent, (int, float)) or not real(b, input):
        raise Leave("the exponent is not a constant")
    return b.finish(aten.pow.Tensor_Scalar, input, exponent)


@spelling("square")
def square(b: Builder, input: Node) -> Node:
    return pow(b, input, 2)


@spelling("gelu")
def gelu(b: Builder, input: Node, approximate: str = "none") -> Node:
    return b.finish(aten.gelu.default, input, approximate=approximate)


@spelling("softplus")
def softplus(b: Builder, input: Node, beta: float = 1, threshold: float = 20) -> Node:
    """``x`` itself beyond the threshold, as torch has it; the logarithm rounds to that from 15 on in float32."""
    if threshold < 15:
        raise Leave("a softplus that is cut off where it can be told from its operand")
    return b.finish(aten.softplus.default, input, beta, threshold)


@spelling("minimum")
def minimum(b: Builder, input: Node, other: Node) -> Node:
    return _extremum(b, aten.minimum.default, input, other)


@spelling("maximum")
def maximum(b: Builder, input: Node, other: Node) -> Node:
    return _extremum(b, aten.maximum.default, input, other)


def _extremum(b: Builder, target: Any, input: Node, other: Node) -> Node:
    b.tensor(input), b.tensor(other)
    return b.finish(target, input, other)


@spelling("clamp", "clip")
def clamp(b: Builder, input: Node, min: Any = None, max: Any = None) -> Node:
    b.tensor(input)
    if not all(bound is None or isinstance(bound, (int, float)) for bound in (min, max)):
        raise Leave("a bound is not a constant")
    return b.finish(aten.clamp.default, input, min, max)


@spelling("clamp_min")
def clamp_min(b: Builder, input: Node, min: Any) -> Node:
    return clamp(b, input, min, None)


@spelling("clamp_max")
def clamp_max(b: Builder, input: Node, max: Any) -> Node:
    return clamp(b, input, None, max)


@spelling(functions=(torch.where, aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther))
def where(b: Builder, condition: Node, input: Any, other: Any) -> Node:
    _operands(b, condition, input, other)
    if b.tensor(condition).dtype != torch.bool or (number(input) and number(other)):
        raise Leave("not a choice between values by a truth value")
    kind = aten.where.ScalarSelf if number(input) else aten.where.ScalarOther if number(other) else aten.where.self
    return b.finish(kind, condition, input, other)


@spelling("where", search=False)
def where_method(b: Builder, input: Node, condition: Node, other: Any) -> Node:
    return where(b, condition, input, other)


@spelling("masked_fill")
def masked_fill(b: Builder, input: Node, mask: Node, value: Any) -> Node:
    if not isinstance(value, (int, float)):
        raise Leave("filled with a tensor")
    return where(b, mask, value, input)


def _read_relation(name: str, *aliases: str) -> None:
    target = getattr(aten, name)

    @spelling(name, *aliases, f"__{name}__")
    def read(b: Builder, input: Node, other: Any) -> Node:
        _operands(b, input, other)
        if isinstance(value_of(other) if isinstance(other, Node) else other, (SymInt, SymFloat)) or number(input):
            raise Leave("compared with a symbolic number")
        return b.finish(target.Scalar if number(other) else target.Tensor, input, other)


_RELATION_ALIASES = {
    "lt": ("less",), "le": ("less_equal",), "gt": ("greater",), "ge": ("greater_equal",), "ne": ("not_equal",), "eq": ()
}  # fmt: skip
for _name in RELATIONS:
    _read_relation(_name, *_RELATION_ALIASES[_name])


def _truth(b: Builder, *operands: Node) -> None:
    if any(b.tensor(x).dtype != torch.bool for x in operands):
        raise Leave("bits, not truth values")


@spelling("logical_and", "bitwise_and", "__and__", "and_")
def logical_and(b: Builder, input: Node, other: Node) -> Node:
    _truth(b, input, other)
    return b.finish(aten.logical_and.default, input, other)


@spelling("logical_or", "bitwise_or", "__or__", "or_")
def logical_or(b: Builder, input: Node, other: Node) -> Node:
    _truth(b, input, other)
    return b.finish(aten.logical_or.default, input, other)


@spelling("logical_not", "bitwise_not", "__invert__", "invert", "inv")
def logical_not(b: Builder, input: Node) -> Node:
    _truth(b, input)
    return b.finish(aten.logical_not.default, input)


@spelling("dropout", search=False, functions=(F.dropout,))
def dropout(b: Builder, input: Node, p: float = 0.5, training: bool = True, inplace: bool = False) -> Node:
    """The identity when it drops nothing; else random, and not ours."""
    if inplace or not (p == 0 or training is False):
        raise Leave("random")
    return input


@spelling(functions=(torch.dropout,))
def torch_dropout(b: Builder, input: Node, p: float, train: bool) -> Node:
    return dropout(b, input, p, train)


