"""Where rows are in views, in reductions, and in tensors that are joined or taken apart."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import fx

from .rows import (
    SUMMED,
    WHOLE,
    Known,
    Relation,
    Rows,
    Rule,
    are_neighbours,
    complete,
    is_array,
    same,
    shape_of,
)

aten = torch.ops.aten


def regrouped(rows: Rows, source: Sequence[Any], target: Sequence[Any]) -> Rows | None:
    """Where the rows of a tensor of shape ``source`` are when it is viewed, in row-major order, as ``target``.

    They are where as many elements lie before them and they are as many.
    """
    before, count = prod(source[: rows[0]]), prod(source[d] for d in rows)
    for first in range(len(target)):
        if same(target[first], 1) or not same(prod(target[:first]), before):
            continue
        for last in range(first, len(target)):
            if not same(target[last], 1) and same(prod(target[first : last + 1]), count):
                return tuple(range(first, last + 1))
    return None


def view(node: fx.Node, known: Known) -> Relation | None:
    source, result = node.args[0], known.get(node)
    if result == SUMMED or not is_array(source):
        return None
    if result:
        return complete({node: result}, [(source, regrouped(result, shape_of(node), shape_of(source)))])  # type: ignore[arg-type]
    rows = known.get(source)  # type: ignore[arg-type]
    if not rows or rows == SUMMED:
        return None
    found = regrouped(rows, shape_of(source), shape_of(node))  # type: ignore[arg-type]
    return None if found is None else {node: found, source: rows}  # type: ignore[dict-item]


def moved(where: Callable[[fx.Node], list[int | None] | None]) -> Rule:
    """Views and reductions: ``where`` gives for each dimension of the source its place in the result, None if it has none; or None
    where the operation is not one of these."""

    def rule(node: fx.Node, known: Known) -> Relation | None:
        source: Any = node.args[0]
        if not is_array(source):
            return None
        places = where(node)
        result = known.get(node) or None
        if places is None or result == SUMMED:
            return None
        if result is not None:
            rows = tuple(places.index(d) if d in places else -1 for d in result)
        else:
            rows = known.get(source) or WHOLE
            result = tuple(-1 if places[d] is None else places[d] for d in rows)  # type: ignore[misc]
        if not rows or not are_neighbours(rows) or not are_neighbours(result):
            return None
        return {node: result, source: rows}

    return rule


def permuted(node: fx.Node) -> list[int | None]:
    order = list(range(len(shape_of(node))))
    if node.target is aten.permute.default:
        dims: Any = node.args[1]
        order = [d % len(order) for d in dims]
    elif order:
        swapped: Any = (0, -1) if node.target is aten.t.default else node.args[1:3]
        a, b = swapped
        order[a], order[b] = order[b], order[a]
    return [order.index(d) for d in range(len(order))]


def unsqueezed(node: fx.Node) -> list[int | None]:
    rank, at = len(shape_of(node)), _dim(node)
    return [d + (d >= at) for d in range(rank - 1)]


def without(node: fx.Node) -> list[int | None] | None:
    """squeeze.dim, select.int: one dimension less."""
    before = len(shape_of(node)) + 1
    at = _dim(node, before)
    if len(shape_of(node.args[0])) != before:  # type: ignore[arg-type]
        return None
    return [None if d == at else d - (d > at) for d in range(before)]


def cut(node: fx.Node) -> list[int | None]:
    """slice.Tensor, softmax: one dimension is looked at as a whole."""
    at = _dim(node)
    return [None if d == at else d for d in range(len(shape_of(node)))]


def _dim(node: fx.Node, rank: int = 0, position: int = 1) -> int:
    """The dimension that an operation names, of the result's or of ``rank``."""
    dim: Any = node.args[position] if len(node.args) > position else 0
    return dim % (rank or len(shape_of(node)))


def expanded(node: fx.Node) -> list[int | None]:
    """A dimension that is made longer holds no rows."""
    source, shape = shape_of(node.args[0]), shape_of(node)  # type: ignore[arg-type]
    offset = len(shape) - len(source)
    return [d + offset if same(size, shape[d + offset]) else None for d, size in enumerate(source)]


def reduced(node: fx.Node) -> list[int | None]:
    """A reduction over some dimensions."""
    rank = len(shape_of(node.args[0]))  # type: ignore[arg-type]
    gone = _dims(node, rank)
    kept = len(shape_of(node)) == rank
    return [None if d in gone else d if kept else d - sum(g < d for g in gone) for d in range(rank)]


def _dims(node: fx.Node, rank: int) -> set[int]:
    dims: Any = node.args[1] if len(node.args) > 1 else None
    return {d % rank for d in dims} if dims else set(range(rank))


def summed(node: fx.Node, known: Known) -> Relation | None:
    """A sum: over dimensions that are not rows, or over all that are."""
    source: Any = node.args[0]
    rows = known.get(source) or WHOLE
    if rows and rows != SUMMED and set(rows) <= _dims(node, len(shape_of(source))):
        return {node: SUMMED, source: rows}
    return moved(reduced)(node, known)


def joined(node: fx.Node, known: Known) -> Relation | None:
    """cat: along another dimension, of tensors that all have the rows."""
    parts: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
    at = _dim(node)
    rows = known.get(node) or next((known[part] for part in parts if known.get(part)), None)
    if not rows or rows == SUMMED or at in rows or any(len(shape_of(part)) != len(shape_of(node)) for part in parts):
        return None
    return complete({node: rows}, [(part, rows) for part in parts])


def parted(node: fx.Node, known: Known) -> Relation | None:
    """split: along another dimension; its results are the nodes that take it apart."""
    source: Any = node.args[0]
    parts = [user for user in node.users if user.target is operator.getitem]
    at = _dim(node, len(shape_of(source)), 2)
    rows = known.get(source) or next((known[part] for part in parts if known.get(part)), None)
    if not rows or rows == SUMMED or at in rows:
        return None
    return complete({source: rows}, [(part, rows) for part in parts])
