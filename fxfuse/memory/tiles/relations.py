"""What each operation makes of rows.

An operation may run in tiles if its result at a row depends, of its operands, on that row and on what is whole alone; or if it is
a sum over rows, which is the sum of the tiles' sums. Every operation known here says which of its dimensions are the same dimension;
what is not known is not separable.

With the rows of one tensor given, those of the others follow. So there is one question, ``relate``.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ...products import calls
from ..joint import is_rows, outputs_of, program_of
from . import views
from .contractions import contraction
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
    lowered,
    raised,
    shape_of,
)

aten = torch.ops.aten


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


def _pointwise(node: fx.Node, known: Known) -> Relation | None:
    operands, shape = [n for n in node.all_input_nodes if is_array(n)], shape_of(node)
    result = known.get(node) or next((raised(known[o], o, len(shape)) for o in operands if known.get(o)), None)
    if not result or result == SUMMED:
        return None
    return complete({node: result}, [(operand, lowered(result, operand, shape)) for operand in operands])


def _fused(node: fx.Node, known: Known) -> Relation | None:
    """A row program says of each tensor over which leading dimensions it varies; nothing in it looks from row to row, and an output
    without a dimension is the sum over it."""
    program, results = program_of(node), outputs_of(node)
    rank = program.rank + 1
    operands = list(zip(program.arguments, node.args[0], strict=True))  # type: ignore[arg-type]
    rows = next((raised(known[o], o, rank) for _, o in operands if known.get(o)), None)
    if rows is None:
        rows = next((known[r] for r in results.values() if known.get(r) and known[r] != SUMMED), None)
    if rows is None or SUMMED[0] in rows or max(rows) >= program.rank or not are_neighbours(rows):
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
    return complete(found, more)


def _thin_pair(node: fx.Node, known: Known) -> Relation | None:
    """``buffer[:, a:b] = matrix @ right`` and ``matrix' @ left``: rows of the matrix are rows, of the second a sum over them."""
    buffer, _, _, matrix, right, left, *_ = node.args
    varying = [n for n in (buffer, matrix, left, _result(node, 0)) if isinstance(n, fx.Node)]
    if not any(known.get(n) == (0,) for n in varying) and known.get(_result(node, 1)) != SUMMED:  # type: ignore[arg-type]
        return None
    return complete({}, [*((n, (0,)) for n in varying), (right, WHOLE), (_result(node, 1), SUMMED)])


def _result(node: fx.Node, index: int) -> fx.Node | None:
    """The node that takes a result."""
    return next((user for user in node.users if user.target is operator.getitem and user.args[1] == index), None)


_product = contraction("mn", a0="mk", a1="kn")
_RULES: dict[Any, Rule] = {
    aten.mm.default: _product,
    aten.bmm.default: contraction("bmn", a0="bmk", a1="bkn"),
    aten.addmm.default: contraction("mn", a0="mn", a1="mk", a2="kn"),
    aten.baddbmm.default: contraction("bmn", a0="bmn", a1="bmk", a2="bkn"),
    calls.product: _product,
    calls.mixed_product: _product,
    calls.accumulate: contraction("mn", a0="mn", a1="mk", a2="kn"),
    # Columns of a wider buffer: dimension c is the buffer's, n the product's.
    calls.columns: contraction("mc", a0="mc", a1="mk", a2="kn"),
    calls.thin_pair: _thin_pair,
    calls.with_room: contraction("mc", a0="mx"),
    calls.left_parts: contraction("mc", a0="mx"),
    calls.right_parts: contraction("cn", a0="xn"),
    aten.view.default: views.view,
    aten._unsafe_view.default: views.view,
    aten.reshape.default: views.view,
    aten.t.default: views.moved(views.permuted),
    aten.transpose.int: views.moved(views.permuted),
    aten.permute.default: views.moved(views.permuted),
    aten.unsqueeze.default: views.moved(views.unsqueezed),
    aten.squeeze.dim: views.moved(views.without),
    aten.select.int: views.moved(views.without),
    aten.slice.Tensor: views.moved(views.cut),
    aten._softmax.default: views.moved(views.cut),
    aten._log_softmax.default: views.moved(views.cut),
    aten.expand.default: views.moved(views.expanded),
    aten.sum.dim_IntList: views.summed,
    aten.mean.dim: views.moved(views.reduced),
    aten.amax.default: views.moved(views.reduced),
    aten.cat.default: views.joined,
    aten.split_with_sizes.default: views.parted,
    aten.split.Tensor: views.parted,
}
