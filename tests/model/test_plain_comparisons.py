"""A size and a number compare as sympy has it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import sympy
from sympy.core import relational
from sympy.core.cache import clear_cache

from fxfuse.capture import plain_comparisons

KINDS = [{"integer": True, "positive": True}, {"integer": True}, {"positive": True}, {"integer": True, "nonnegative": True},
         {"integer": True, "positive": True, "even": True}, {}]  # fmt: skip
RELATIONS = [sympy.Ge, sympy.Gt, sympy.Le, sympy.Lt, sympy.Eq, sympy.Ne, operator.ge, operator.lt, relational.is_ge, relational.is_gt,
             relational.is_le, relational.is_lt, relational.is_eq, relational.is_neq]  # fmt: skip


def answers(relation: Callable[..., Any]) -> list[str]:
    clear_cache()
    found = []
    for kind in KINDS:
        size, other = sympy.Symbol("s0", **kind), sympy.Symbol("s1", **kind)
        for number in (*range(-3, 5), 2**63 - 1):
            number = sympy.Integer(number)
            for pair in ((size, number), (number, size), (size * other, number), (size + other, number)):
                found.append(f"{pair}: {relation(*pair)}")
        found += [str(relation(size, other)), str(relation(size, size)), str(relation(size, sympy.Rational(1, 2)))]
    return found


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda relation: relation.__name__)
def test_comparisons_are_sympys(relation: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = answers(relation)
    for owner, name, value in plain_comparisons.SETTINGS:
        monkeypatch.setattr(owner, name, value)
    relation = getattr(relational, relation.__name__) if relation.__name__.startswith("is_") else relation
    assert answers(relation) == wanted
