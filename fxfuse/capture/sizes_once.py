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

from fxfuse._torch import (
    SymNode,
    dispatch_mode,
    functional_tensors,
    mode_keys,
    no_proxy_mode,
    pre_dispatch_modes,
)

OPERATIONS = ("add", "sub", "mul", "eq", "ne", "lt", "le", "gt", "ge", "mod", "int_floordiv", "sym_max", "sym_min", "and_", "or_")
_KEPT, _NO_NUMBER = "_fxfuse_sizes", "_fxfuse_no_number"


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
        kept = self.shape_env.__dict__.setdefault(_KEPT, {})
        by_identity = name, id(left), self.pytype, id(right), other.pytype
        found = kept.get(by_identity)
        if found is not None:
            return _again(found[0])
        by_value = name, left, self.pytype, right, other.pytype
        result = kept.get(by_value)
        if result is None:
            result = kept[by_value] = _untraced(compute, self, other) if _wrapping.now else compute(self, other)
        kept[by_identity] = result, left, right  # (which stay alive, or their identities could be others')
        return _again(result)

    return operation


def _untraced(compute: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
    with no_proxy_mode():
        return compute(left, right)


def _again(result: Any) -> Any:
    """A size of its own: tracers tell results apart by identity."""
    copy = object.__new__(SymNode)
    copy.__dict__ = result.__dict__.copy()
    return copy


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
    (functional_tensors.FunctionalTensor, "__new__", wrapping(functional_tensors.FunctionalTensor.__new__)),
)
