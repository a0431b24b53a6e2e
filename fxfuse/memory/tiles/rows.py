"""Which dimensions of a tensor are the rows that a tile is a part of.

``Rows`` are the positions of neighbouring dimensions that number the rows in row-major order: ``(0,)`` of [T, K], ``(0, 1)`` of
[B, S, K], ``(2,)`` of [1, heads, S, D]. ``WHOLE``: the tensor is the same for every row. ``SUMMED``: it is a sum over all rows.

No size is taken for a token count because of its value: equality of sizes is proven for all sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

Rows = tuple[int, ...]
WHOLE: Rows = ()
SUMMED: Rows = (-1,)
Relation = dict[fx.Node, Rows]
Known = Mapping[fx.Node, Rows]
Rule = Callable[[fx.Node, Known], Relation | None]


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def same(a: Any, b: Any) -> bool:
    """Are two sizes equal whatever the sizes of the graph's inputs."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt) and a.node.expr == b.node.expr:
        return True
    return statically_known_true(a == b)


def is_array(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor)


def raised(rows: Rows, operand: fx.Node, rank: int) -> Rows:
    """An operand's dimensions counted in a result of ``rank`` dimensions, to which it is broadcast."""
    return tuple(d + rank - len(shape_of(operand)) for d in rows)


def lowered(rows: Rows, operand: fx.Node, shape: Sequence[Any]) -> Rows | None:
    """The rows of an operand that is broadcast to ``shape``, whose rows are given; None where it has some of their dimensions."""
    offset = len(shape) - len(shape_of(operand))
    sizes = [shape_of(operand)[d - offset] if d >= offset else 1 for d in rows]
    if all(same(size, 1) for size in sizes):
        return WHOLE
    if all(same(size, shape[d]) for size, d in zip(sizes, rows, strict=True)):
        return tuple(d - offset for d in rows)
    return None


def complete(found: Relation, more: Sequence[tuple[Any, Rows | None]]) -> Relation | None:
    """``found`` with the rows of more tensors; None if one has none, or two different ones."""
    for node, rows in more:
        if isinstance(node, fx.Node) and (rows is None or found.setdefault(node, rows) != rows):
            return None
    return found


def are_neighbours(rows: Rows) -> bool:
    return rows[0] >= 0 and all(b == a + 1 for a, b in pairwise(rows))
