"""Arithmetic of symbolic sizes, done once for a graph while it is compiled.

Each tensor that stands in for one of a graph is asked whether it is contiguous, and that multiplies and compares its sizes: tens of
thousands of products and comparisons of a dozen sizes for a decoder layer, of which a few hundred differ. What came of one is kept with
the sizes' own environment, by the operation and its two expressions. A later fact about the sizes (that two are equal) changes no
expression that is kept: torch rewrites it when it is read. What a tracer records goes its own way, but for what torch asks as it puts
a tensor into AOTAutograd's wrapper: how large its memory is and whether it is contiguous, which no operation is given.

An expression is found by its identity first: to hash and compare it as sympy does takes longer than most of these operations.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any

import sympy
from torch import SymBool

from fxfuse._torch import (
    SymNode,
    dispatch_mode,
    functional_tensors,
    mode_keys,
    no_proxy_mode,
    pre_dispatch_modes,
    symbolic_shapes,
)

_guard_or_of_torch = symbolic_shapes._guard_or

OPERATIONS = ("add", "sub", "mul", "eq", "ne", "lt", "le", "gt", "ge", "mod", "int_floordiv", "sym_max", "sym_min", "and_", "or_")
QUESTIONS = ("guard_bool", "guard_or_false", "guard_or_true", "guard_size_oblivious", "expect_true")
_KEPT, _NO_NUMBER = "_fxfuse_sizes", "_fxfuse_no_number"
_new = object.__new__


class _Wrapping(threading.local):
    now = False


_wrapping = _Wrapping()


def once(name: str) -> Callable[[Any, Any], Any]:
    """The method of a symbolic size, of which equal calls compute once."""
    compute = getattr(SymNode, name)
    proxy, traced_before_dispatch = mode_keys.PROXY, pre_dispatch_modes().get

    @wraps(compute)
    def operation(self: Any, other: Any) -> Any:
        if type(other) is not SymNode or self.shape_env is None:
            return compute(self, other)
        if not _wrapping.now and (dispatch_mode(proxy) is not None or traced_before_dispatch(0) is not None):  # a tracer's
            return compute(self, other)
        left, right = self._expr, other._expr
        kept = self.shape_env.__dict__.get(_KEPT)
        if kept is None:
            kept = self.shape_env.__dict__[_KEPT] = {}
        by_identity = name, id(left), self.pytype, id(right), other.pytype
        found = kept.get(by_identity)
        if found is not None:
            facts = found[0].__dict__
            if facts.get(_NO_NUMBER) != self.shape_env._version_counter and found[0].pytype is int:
                found[0].maybe_as_int()  # which is asked of most, and known to each copy then
            again = _new(SymNode)  # tracers tell results apart by identity
            again.__dict__ = facts.copy()
            return again
        by_value = name, left, self.pytype, right, other.pytype
        result = kept.get(by_value)
        if result is None:
            result = kept[by_value] = _untraced(compute, self, other) if _wrapping.now else compute(self, other)
        kept[by_identity] = result, left, right  # (which stay alive, or their identities could be others')
        return operation(self, other)

    return operation


def _untraced(compute: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
    with no_proxy_mode():
        return compute(left, right)


def as_int(of_torch: Callable[[Any], int | None]) -> Callable[[Any], int | None]:
    """What number a size is, if it is one. That it is none holds until something new is known of the sizes."""

    @wraps(of_torch)
    def maybe_as_int(self: Any) -> int | None:
        if self.shape_env is None:
            return of_torch(self)
        facts, known = self.__dict__, self.shape_env._version_counter
        if facts.get(_NO_NUMBER) == known:
            return None
        number = of_torch(self)
        if number is None:
            facts[_NO_NUMBER] = known
        return number

    return maybe_as_int


def plainly(ask: Callable[..., bool]) -> Callable[..., bool]:
    """The truth of a comparison, which most are decided by: that is no guard, and nobody needs to be asked."""

    @wraps(ask)
    def answered(self: Any, *place: Any) -> bool:
        truth = self._expr
        return True if truth is sympy.true else False if truth is sympy.false else ask(self, *place)

    return answered


def _guard_or(a: Any, default: bool) -> bool:
    """torch's, for those who ask in Python."""
    if type(a) is bool:
        return a
    truth = a.node._expr if type(a) is SymBool and type(a.node) is SymNode else None
    return True if truth is sympy.true else False if truth is sympy.false else _guard_or_of_torch(a, default)


def wrapping(new: Callable[..., Any]) -> Callable[..., Any]:
    """The making of a wrapper."""

    @wraps(new)
    def made(*args: Any) -> Any:
        _wrapping.now = True
        try:
            return new(*args)
        finally:
            _wrapping.now = False

    return made


SETTINGS: tuple[tuple[Any, str, Any], ...] = (
    *((SymNode, name, once(name)) for name in OPERATIONS),
    (SymNode, "maybe_as_int", as_int(SymNode.maybe_as_int)),
    *((SymNode, name, plainly(getattr(SymNode, name))) for name in QUESTIONS),
    (symbolic_shapes, "_guard_or", _guard_or),
    (functional_tensors.FunctionalTensor, "__new__", wrapping(functional_tensors.FunctionalTensor.__new__)),
)
