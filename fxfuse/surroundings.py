"""What a plain function's result depends on beside its tensors: its other arguments, and what its code reads around it.

A traced function holds all of that as constants, so a call in which it differs is another instance. Numbers and texts are compared by
value; other objects (functions, modules, tensors that the code reads) by identity: an instance keeps the tensors it was traced
with alive. Of an object that is given, or that a method is bound to, the attributes count. Deeper nobody looks.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def surroundings(function: Callable[..., Any]) -> Callable[[Sequence[Any]], tuple]:
    """A function of the leaves of a call's arguments: equal results for calls that one instance can serve, but for the tensors."""
    owner = getattr(function, "__self__", None)
    plain = inspect.unwrap(function.func if isinstance(function, functools.partial) else function)
    code: CodeType | None = getattr(plain, "__code__", None)
    around: dict[str, Any] = getattr(plain, "__globals__", {})
    names = () if code is None else code.co_names
    cells = getattr(plain, "__closure__", None) or ()

    def facts(leaves: Sequence[Any]) -> tuple:
        given = tuple(None if isinstance(leaf, Tensor) else identity(leaf) for leaf in leaves)
        read = tuple(value_of(around[name]) for name in names if name in around)
        held = tuple(identity(cell.cell_contents) for cell in cells)
        return given, read, held, None if owner is None else identity(owner), torch.get_default_dtype()

    return facts


def value_of(value: Any) -> Any:
    """A plain value as itself, with its type and the sign of its zero; anything else as the object it is."""
    if isinstance(value, float):
        return float, repr(value)
    if isinstance(value, tuple):
        return tuple, *map(value_of, value)
    return (type(value), value) if isinstance(value, _PLAIN) else id(value)


def identity(value: Any) -> Any:
    """The same, with the attributes of an object."""
    if isinstance(value, (*_PLAIN, tuple, Tensor)) or not hasattr(value, "__dict__") or callable(getattr(value, "__code__", None)):
        return value_of(value)
    held = [value_of(attribute) for attribute in vars(value).values()]
    if isinstance(value, nn.Module):
        held += [id(tensor) for tensor in (*value._parameters.values(), *value._buffers.values())]
    return id(value), *held
