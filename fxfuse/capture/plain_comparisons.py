"""A size compared with a number: what sympy says, said at once.

Of a positive integer sympy knows that it is one or more, and no more than that; for the rest torch looks at the size's range. sympy
finds this out for each symbol anew, by what is known of the difference and of all its parts: a millisecond each.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from sympy import Integer, Symbol
from sympy.core import relational

_ge_of_sympy, _eq_of_sympy = relational.is_ge, relational.is_eq
_SIZE = {"integer": True, "positive": True}


def _is_size(value: Any) -> bool:
    return type(value) is Symbol and value._assumptions_orig == _SIZE


@wraps(_ge_of_sympy)
def is_ge(lhs: Any, rhs: Any, assumptions: Any = None) -> bool | None:
    if assumptions is None:
        if isinstance(rhs, Integer) and _is_size(lhs):
            return True if rhs.p <= 1 else None
        if isinstance(lhs, Integer) and _is_size(rhs):
            return False if lhs.p <= 0 else None
    return _ge_of_sympy(lhs, rhs, assumptions)


@wraps(_eq_of_sympy)
def is_eq(lhs: Any, rhs: Any, assumptions: Any = None) -> bool | None:
    if assumptions is None:
        size, number = (rhs, lhs) if isinstance(lhs, Integer) else (lhs, rhs)
        if isinstance(number, Integer) and _is_size(size):
            return False if number.p <= 0 else None
    return _eq_of_sympy(lhs, rhs, assumptions)


SETTINGS: tuple[tuple[Any, str, Any], ...] = ((relational, "is_ge", is_ge), (relational, "is_eq", is_eq))
