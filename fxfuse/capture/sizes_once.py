"""Arithmetic of symbolic sizes, done once for a graph while it is compiled.

Each tensor that stands in for one of a graph is asked whether it is contiguous, and that multiplies and compares its sizes: tens of
thousands of products and comparisons of a dozen sizes for a decoder layer, of which a few hundred differ. What came of one is kept with
the sizes' own environment, by the operation and its two expressions. A later fact about the sizes (that two are equal) changes no
expression that is kept: torch rewrites it when it is read. What a tracer records goes its own way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from fxfuse._torch import SymNode, get_proxy_mode

OPERATIONS = ("add", "sub", "mul", "eq", "ne", "lt", "le", "gt", "ge")
_KEPT = "_fxfuse_sizes"


def once(name: str) -> Callable[[Any, Any], Any]:
    """The method of a symbolic size, of which equal calls compute once."""
    compute = getattr(SymNode, name)

    @wraps(compute)
    def operation(self: Any, other: Any) -> Any:
        if type(other) is not SymNode or self.shape_env is None or get_proxy_mode() is not None:
            return compute(self, other)
        environment = vars(self.shape_env)
        kept = environment.get(_KEPT)
        if kept is None:
            kept = environment[_KEPT] = {}
        key = name, self._expr, self.pytype, other._expr, other.pytype
        found = kept.get(key)
        if found is None:
            kept[key] = compute(self, other)
            return kept[key]
        result = object.__new__(SymNode)  # tracers tell results apart by identity
        vars(result).update(vars(found))
        return result

    return operation


SETTINGS: tuple[tuple[Any, str, Any], ...] = tuple((SymNode, name, once(name)) for name in OPERATIONS)
