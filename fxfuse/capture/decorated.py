"""A forward behind decorators, and the same decorators around another function.

transformers decorates a head's forward (what it returns is made a tuple, arguments get their defaults). Such a wrapper only calls what
it decorates, and Dynamo can trace no part of it: the backbone inside is kept out, so that every frame around it breaks there. It
traced each wrapper up to that place, twice, wrote code for the rest, and guarded all of it in every step.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any


def decorated(forward: Any) -> tuple[Any, Callable[[Callable], Callable]]:
    """The innermost function of ``forward``, and what puts its decorators around another one.

    A decorator is a Python function that holds what it decorates in a variable of its own, as ``functools.wraps`` notes it down.
    """
    inner, cell = forward, _holder(forward)
    if cell is None:
        return forward, lambda function: function
    inner, around = decorated(cell.cell_contents)
    return inner, lambda function: _copy(forward, cell, around(function))


def _holder(forward: Any) -> CellType | None:
    """The one variable of a decorator in which what it decorates is."""
    wrapped = getattr(forward, "__wrapped__", None)
    if type(forward) is not FunctionType or not isinstance(wrapped, FunctionType):
        return None
    cells = [cell for cell in forward.__closure__ or () if _content(cell) is wrapped]
    return cells[0] if len(cells) == 1 else None


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # (of a function that was not made to the end)
        return None


def _copy(decorator: FunctionType, cell: CellType, function: Callable) -> FunctionType:
    """The decorator around ``function``."""
    closure = tuple(CellType(function) if other is cell else other for other in decorator.__closure__ or ())
    copy = FunctionType(decorator.__code__, decorator.__globals__, decorator.__name__, decorator.__defaults__, closure)
    copy.__kwdefaults__, copy.__qualname__ = decorator.__kwdefaults__, decorator.__qualname__
    copy.__dict__.update(decorator.__dict__, __wrapped__=function)
    return copy
