"""Where rows are in products: their dimensions have names, as in an einsum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ...products import calls
from .rows import SUMMED, WHOLE, Known, Relation, Rows, Rule, complete, is_array, same, shape_of

_SUMS = (torch.ops.aten.mm.default, calls.product, calls.mixed_product)  # products that are nothing but a sum


def contraction(result: str, **factors: str) -> Rule:
    """``result`` and ``factors`` (by position: ``a0="mk"``) name dimensions; a factor with as many dimensions less is broadcast.

    The dimension ``k`` is summed over. A dimension that only one of them has, and that is not summed over, has no rows.
    """
    places = {int(name[1:]): labels for name, labels in factors.items()}

    def rule(node: fx.Node, known: Known) -> Relation | None:
        operands: list[tuple[Any, str]] = [(node.args[i], labels) for i, labels in places.items()
                                           if i < len(node.args) and is_array(node.args[i])]
        if any(len(shape_of(o)) > len(labels) for o, labels in operands):
            return None
        named = [(o, labels[len(labels) - len(shape_of(o)):]) for o, labels in operands]
        label = _label(node, known, result, named)
        if label is None:
            return None
        if label == "k":
            if node.target not in _SUMS:
                return None  # something is added to the sum, or it is written into a part of something
            return complete({node: SUMMED}, [(o, (labels.index("k"),)) for o, labels in named])
        if label not in result or sum(label in labels for _, labels in operands) == 0:
            return None
        return complete({node: (result.index(label),)},
                         [(o, _lowered_by_name(label, o, labels, node, result)) for o, labels in named])

    return rule


def _label(node: fx.Node, known: Known, result: str, named: Sequence[tuple[Any, str]]) -> str | None:
    """The name of the one dimension that is the rows."""
    for candidate, labels in [(node, result), *named]:
        rows = known.get(candidate)
        if rows == SUMMED:
            return "k"
        if rows:
            return labels[rows[0]] if len(rows) == 1 else None
    return None


def _lowered_by_name(label: str, operand: fx.Node, labels: str, node: fx.Node, result: str) -> Rows | None:
    if label not in labels:
        return WHOLE
    d = labels.index(label)
    if same(shape_of(operand)[d], 1):
        return WHOLE
    return (d,) if same(shape_of(operand)[d], shape_of(node)[result.index(label)]) else None
