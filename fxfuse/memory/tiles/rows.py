"""Which dimensions of a tensor are the rows that a tile is a part of, and what each operation makes of them.

``Rows`` are the positions of neighbouring dimensions that number the rows in row-major order: ``(0,)`` of [T, K], ``(0, 1)`` of
[B, S, K], ``(2,)`` of [1, heads, S, D]. ``WHOLE``: the tensor is the same for every row. ``SUMMED``: it is a sum over all rows.

An operation may run in tiles if its result at a row depends, of its operands, on that row and on what is whole alone; or if it is
a sum over rows, which is the sum of the tiles' sums. Every operation known here says which of its dimensions are the same dimension;
what is not known is not separable. No size is taken for a token count because of its value: equality of sizes is proven for all sizes.

With the rows of one tensor given, those of the others follow. So there is one question, ``relate``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ...products import calls
from ..joint import is_rows, outputs_of, program_of

aten = torch.ops.aten

Rows = tuple[int, ...]
WHOLE: Rows = ()
SUMMED: Rows = (-1,)
Relation = dict[fx.Node, Rows]
Known = Mapping[fx.Node, Rows]
Rule = Callable[[fx.Node, Known], Relation | None]


def relate(node: fx.Node, known: Known) -> Relation | None:
    """The rows of an operation's operands and results, from those ``known`` of some of them; None if it may not run in tiles.

    Operands that vary with no row are WHOLE. An operation with several results is asked for itself; its results are the nodes that
    take it apart.
    """
    if node.op != "call_function" or any(known.get(used) == SUMMED for used in node.all_input_nodes):
        return None
    if is_rows(node):
        return _fused(node, known)
    rule = _RULES.get(node.target)
    if rule is not None:
        return rule(node, known)
    return _pointwise(node, known) if is_pointwise(node) else None


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


def is_pointwise(node: fx.Node) -> bool:
    """Is each element of the result a function of the operands' elements at its place, drawing no random number."""
    target = node.target
    if target in _LIKE_POINTWISE:
        return True
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable or not is_array(node):
        return False
    return torch.Tag.pointwise in target.tags and torch.Tag.nondeterministic_seeded not in target.tags


_LIKE_POINTWISE = (aten._to_copy.default, aten.clone.default, aten.alias.default, aten.detach.default,
                   aten.zeros_like.default, aten.ones_like.default, aten.full_like.default)


# -- broadcasting -----------------------------------------------------------------------------------------------------------


def _raised(rows: Rows, operand: fx.Node, rank: int) -> Rows:
    """An operand's dimensions counted in a result of ``rank`` dimensions, to which it is broadcast."""
    return tuple(d + rank - len(shape_of(operand)) for d in rows)


def _lowered(rows: Rows, operand: fx.Node, shape: Sequence[Any]) -> Rows | None:
    """The rows of an operand that is broadcast to ``shape``, whose rows are given; None where it has some of their dimensions."""
    offset = len(shape) - len(shape_of(operand))
    sizes = [shape_of(operand)[d - offset] if d >= offset else 1 for d in rows]
    if all(same(size, 1) for size in sizes):
        return WHOLE
    if all(same(size, shape[d]) for size, d in zip(sizes, rows, strict=True)):
        return tuple(d - offset for d in rows)
    return None


def _pointwise(node: fx.Node, known: Known) -> Relation | None:
    operands, shape = [n for n in node.all_input_nodes if is_array(n)], shape_of(node)
    result = known.get(node) or next((_raised(known[o], o, len(shape)) for o in operands if known.get(o)), None)
    if not result or result == SUMMED:
        return None
    return _complete({node: result}, [(operand, _lowered(result, operand, shape)) for operand in operands])


def _complete(found: Relation, more: Sequence[tuple[Any, Rows | None]]) -> Relation | None:
    """``found`` with the rows of more tensors; None if one has none, or two different ones."""
    for node, rows in more:
        if isinstance(node, fx.Node) and (rows is None or found.setdefault(node, rows) != rows):
            return None
    return found


# -- products: dimensions by name -------------------------------------------------------------------------------------------


def _einsum(result: str, **factors: str) -> Rule:
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
            return _complete({node: SUMMED}, [(o, (labels.index("k"),)) for o, labels in named])
        if label not in result or sum(label in labels for _, labels in operands) == 0:
            return None
        return _complete({node: (result.index(label),)},
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


# -- views ------------------------------------------------------------------------------------------------------------------


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


def _view(node: fx.Node, known: Known) -> Relation | None:
    source, result = node.args[0], known.get(node)
    if result == SUMMED or not is_array(source):
        return None
    if result:
        return _complete({node: result}, [(source, regrouped(result, shape_of(node), shape_of(source)))])  # type: ignore[arg-type]
    rows = known.get(source)  # type: ignore[arg-type]
    if not rows or rows == SUMMED:
        return None
    found = regrouped(rows, shape_of(source), shape_of(node))  # type: ignore[arg-type]
    return None if found is None else {node: found, source: rows}  # type: ignore[dict-item]


def _moved(where: Callable[[fx.Node], list[int | None] | None]) -> Rule:
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
        if not rows or not _neighbours(rows) or not _neighbours(result):
            return None
        return {node: result, source: rows}

    return rule


def _neighbours(rows: Rows) -> bool:
    return rows[0] >= 0 and all(b == a + 1 for a, b in pairwise(rows))


def _permuted(node: fx.Node) -> list[int | None]:
    order = list(range(len(shape_of(node))))
    if node.target is aten.permute.default:
        dims: Any = node.args[1]
        order = [d % len(order) for d in dims]
    elif order:
        swapped: Any = (0, -1) if node.target is aten.t.default else node.args[1:3]
        a, b = swapped
        order[a], order[b] = order[b], order[a]
    return [order.index(d) for d in range(len(order))]


def _unsqueezed(node: fx.Node) -> list[int | None]:
    rank, at = len(shape_of(node)), _dim(node)
    return [d + (d >= at) for d in range(rank - 1)]


def _without(node: fx.Node) -> list[int | None] | None:
    """squeeze.dim, select.int: one dimension less."""
    before = len(shape_of(node)) + 1
    at = _dim(node, before)
    if len(shape_of(node.args[0])) != before:  # type: ignore[arg-type]
        return None
    return [None if d == at else d - (d > at) for d in range(before)]


def _cut(node: fx.Node) -> list[int | None]:
    """slice.Tensor, softmax: one dimension is looked at as a whole."""
    at = _dim(node)
    return [None if d == at else d for d in range(len(shape_of(node)))]


def _dim(node: fx.Node, rank: int = 0, position: int = 1) -> int:
    """The dimension that an operation names, of the result's or of ``rank``."""
    dim: Any = node.args[position] if len(node.args) > position else 0
    return dim % (rank or len(shape_of(node)))


def _expanded(node: fx.Node) -> list[int | None]:
    """A dimension that is made longer holds no rows."""
    source, shape = shape_of(node.args[0]), shape_of(node)  # type: ignore[arg-type]
    offset = len(shape) - len(source)
    return [d + offset if same(size, shape[d + offset]) else None for d, size in enumerate(source)]


def _reduced(node: fx.Node) -> list[int | None]:
    """A reduction over some dimensions."""
    rank = len(shape_of(node.args[0]))  # type: ignore[arg-type]
    gone = _dims(node, rank)
    kept = len(shape_of(node)) == rank
    return [None if d in gone else d if kept else d - sum(g < d for g in gone) for d in range(rank)]


def _dims(node: fx.Node, rank: int) -> set[int]:
    dims: Any = node.args[1] if len(node.args) > 1 else None
    return {d % rank for d in dims} if dims else set(range(rank))


def _sum(node: fx.Node, known: Known) -> Relation | None:
    """A sum: over dimensions that are not rows, or over all that are."""
    source: Any = node.args[0]
    rows = known.get(source) or WHOLE
    if rows and rows != SUMMED and set(rows) <= _dims(node, len(shape_of(source))):
        return {node: SUMMED, source: rows}
    return _moved(_reduced)(node, known)


def _joined(node: fx.Node, known: Known) -> Relation | None:
    """cat: along another dimension, of tensors that all have the rows."""
    parts: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
    at = _dim(node)
    rows = known.get(node) or next((known[part] for part in parts if known.get(part)), None)
    if not rows or rows == SUMMED or at in rows or any(len(shape_of(part)) != len(shape_of(node)) for part in parts):
        return None
    return _complete({node: rows}, [(part, rows) for part in parts])


def _parted(node: fx.Node, known: Known) -> Relation | None:
    """split: along another dimension; its results are the nodes that take it apart."""
    source: Any = node.args[0]
    parts = [user for user in node.users if user.target is operator.getitem]
    at = _dim(node, len(shape_of(source)), 2)
    rows = known.get(source) or next((known[part] for part in parts if known.get(part)), None)
    if not rows or rows == SUMMED or at in rows:
        return None
    return _complete({source: rows}, [(part, rows) for part in parts])


# -- fused ops --------------------------------------------------------------------------------------------------------------


def _fused(node: fx.Node, known: Known) -> Relation | None:
    """A row program says of each tensor over which leading dimensions it varies; nothing in it looks from row to row, and an output
    without a dimension is the sum over it."""
    program, results = program_of(node), outputs_of(node)
    rank = program.rank + 1
    operands = list(zip(program.arguments, node.args[0], strict=True))  # type: ignore[arg-type]
    rows = next((_raised(known[o], o, rank) for _, o in operands if known.get(o)), None)
    if rows is None:
        rows = next((known[r] for r in results.values() if known.get(r) and known[r] != SUMMED), None)
    if rows is None or SUMMED[0] in rows or max(rows) >= program.rank or not _neighbours(rows):
        return None
    found: Relation = {}
    more: list[tuple[Any, Rows | None]] = []
    for argument, operand in operands:
        flags = {argument.rows[d] for d in rows}
        offset = rank - len(shape_of(operand))
        more.append((operand, None if len(flags) > 1 else tuple(d - offset for d in rows) if True in flags else WHOLE))
    for index, result in results.items():
        output = program.outputs[index]
        flags = {output.rows[d] for d in rows}
        varies = all(program.extents[value].row for value, _ in output.stores)
        more.append((result, None if len(flags) > 1 else rows if True in flags else SUMMED if varies else None))
    return _complete(found, more)


def _thin_pair(node: fx.Node, known: Known) -> Relation | None:
    """``buffer[:, a:b] = matrix @ right`` and ``matrix' @ left``: rows of the matrix are rows, of the second a sum over them."""
    buffer, _, _, matrix, right, left, *_ = node.args
    varying = [n for n in (buffer, matrix, left, _result(node, 0)) if isinstance(n, fx.Node)]
    if not any(known.get(n) == (0,) for n in varying) and known.get(_result(node, 1)) != SUMMED:  # type: ignore[arg-type]
        return None
    return _complete({}, [*((n, (0,)) for n in varying), (right, WHOLE), (_result(node, 1), SUMMED)])


def _result(node: fx.Node, index: int) -> fx.Node | None:
    """The node that takes a result."""
    return next((user for user in node.users if user.target is operator.getitem and user.args[1] == index), None)


_SUMS = (aten.mm.default, calls.product, calls.mixed_product)
_product = _einsum("mn", a0="mk", a1="kn")
_RULES: dict[Any, Rule] = {
    aten.mm.default: _product,
    aten.bmm.default: _einsum("bmn", a0="bmk", a1="bkn"),
    aten.addmm.default: _einsum("mn", a0="mn", a1="mk", a2="kn"),
    aten.baddbmm.default: _einsum("bmn", a0="bmn", a1="bmk", a2="bkn"),
    calls.product: _product,
    calls.mixed_product: _product,
    calls.accumulate: _einsum("mn", a0="mn", a1="mk", a2="kn"),
    # Columns of a wider buffer: dimension c is the buffer's, n the product's.
    calls.columns: _einsum("mc", a0="mc", a1="mk", a2="kn"),
    calls.thin_pair: _thin_pair,
    calls.with_room: _einsum("mc", a0="mx"),
    calls.left_parts: _einsum("mc", a0="mx"),
    calls.right_parts: _einsum("cn", a0="xn"),
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.reshape.default: _view,
    aten.t.default: _moved(_permuted),
    aten.transpose.int: _moved(_permuted),
    aten.permute.default: _moved(_permuted),
    aten.unsqueeze.default: _moved(_unsqueezed),
    aten.squeeze.dim: _moved(_without),
    aten.select.int: _moved(_without),
    aten.slice.Tensor: _moved(_cut),
    aten._softmax.default: _moved(_cut),
    aten._log_softmax.default: _moved(_cut),
    aten.expand.default: _moved(_expanded),
    aten.sum.dim_IntList: _sum,
    aten.mean.dim: _moved(_reduced),
    aten.amax.default: _moved(_reduced),
    aten.cat.default: _joined,
    aten.split_with_sizes.default: _parted,
    aten.split.Tensor: _parted,
}
