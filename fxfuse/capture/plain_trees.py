"""Tuples, lists and dictionaries of an operation's operands, gone through directly.

AOTAutograd takes the operands of each operation out of their wrappers and puts its results into some. torch's functions for that go
through any structure that anybody has registered, by writing down its form first. Of what an operation takes, next to all is tuples
of tensors: those are mapped as they stand here, everything else by torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fxfuse._torch import functional_tensors, trees

_of_torch = trees.tree_map_only
_REGISTERED = trees.SUPPORTED_NODES


def tree_map_only(wanted: Any, function: Callable[[Any], Any], tree: Any, *more: Any, **named: Any) -> Any:
    """``tree`` with ``function`` of each leaf that is of a type."""
    if more or named or not isinstance(wanted, type | tuple):
        return _of_torch(wanted, function, tree, *more, **named)
    return _mapped(wanted, function, tree)


def _mapped(wanted: Any, function: Callable[[Any], Any], tree: Any) -> Any:
    kind = type(tree)
    if kind is tuple:
        return tuple([_mapped(wanted, function, part) for part in tree])
    if kind is list:
        return [_mapped(wanted, function, part) for part in tree]
    if kind is dict:
        return {key: _mapped(wanted, function, part) for key, part in tree.items()}
    if kind in _REGISTERED or isinstance(tree, tuple):  # (a named one)
        return _of_torch(wanted, function, tree)
    return function(tree) if isinstance(tree, wanted) else tree


class _Trees:
    """torch's module of trees, with this function for its own."""

    tree_map_only = staticmethod(tree_map_only)

    def __getattr__(self, name: str) -> Any:
        return getattr(trees, name)


# In the module that does it for each operation alone: a model's own use of the function is guarded by Dynamo.
SETTINGS: tuple[tuple[Any, str, Any], ...] = ((functional_tensors, "pytree", _Trees()),)
