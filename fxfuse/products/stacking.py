"""Thin products that read one large operand become one product: the operand is read once.

    x A1', x A2', x A3'       ->   H = x [A1; A2; A3]'         each result a slice of columns of H
    g1' x, g2' x, g3' x       ->   D = [g1, g2, g3]' x         each result a slice of rows of D; the g are written side by side

The second form is the first one's derivative; its g are thin products themselves (``g = s dY B``), so they can be written where they
are wanted. Wide products that share an operand stay apart: there is nothing to gain in one large matmul over two.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import fx

from ..memory.joint import depends
from .calls import columns
from .check import agrees
from .terms import Term, is_thin, made, matrix_source, read_product, size, tensor

aten = torch.ops.aten
STACKED = "fxfuse_stacked"  # node.meta of a slice of columns: (the whole, first column, column after the last)

Report = Callable[[Sequence[Term], str], None]


def stack_shared(graph: fx.Graph, validate: str, report: Report) -> int:
    """Stack all groups of thin products, in place; ``report`` hears of each group, with the reason why it was left (or nothing)."""
    count = 0
    for group in _groups(graph, lambda term: _thin_right(term), lambda term: term.left):
        leaves = [group[0].left, *(matrix_source(term.right) for term in group)]
        count += _replace(group, _stack_right, list(dict.fromkeys(leaves)), validate, report)
    for group in _groups(graph, lambda term: _thin_left(term), lambda term: term.right):
        inner = [read_product(_untransposed(term.left)) for term in group]
        products = [term for term in inner if term is not None]
        if len(products) < len(group) or len({term.node for term in products}) < len(group):
            continue
        leaves = [group[0].right, *(leaf for term in products for leaf in (term.left, term.right))]
        count += _replace(group, _stack_left, list(dict.fromkeys(leaves)), validate, report)
    return count


def _groups(graph: fx.Graph, fits: Callable[[Term], bool], shared: Callable[[Term], fx.Node]) -> list[list[Term]]:
    """Products that fit, by the operand that they share; only groups of two and more, none of which needs another."""
    found: dict[tuple, list[Term]] = defaultdict(list)
    for node in graph.nodes:
        term = read_product(node)
        if term is not None and fits(term):
            found[(shared(term), term.alpha, tensor(node).dtype)].append(term)
    return [group for group in found.values() if len(group) > 1 and not _chained(group)]


def _chained(group: list[Term]) -> bool:
    return any(depends(a.node, b.node) for a in group for b in group if a is not b)


def _thin_right(term: Term) -> bool:
    """``x A'`` with few columns, A from the graph's inputs alone: it can be put beside others before any of them is needed."""
    return is_thin(size(term.right, 1), size(term.right, 0)) and matrix_source(term.right).op == "placeholder"


def _thin_left(term: Term) -> bool:
    """``g' x`` with few rows."""
    return term.left.target is aten.t.default and is_thin(size(term.left, 0), size(term.right, 1)) and term.alpha == 1.0


def _untransposed(node: fx.Node) -> fx.Node:
    return node.args[0]  # type: ignore[return-value]


def _replace(group: list[Term], build: Callable[[list[Term]], tuple[list[fx.Node], dict[fx.Node, fx.Node]]],
             leaves: list[fx.Node], validate: str, report: Report) -> int:
    """Build the stacked form, compare it, and put it in place of the group; or take it out again."""
    fresh, replacements = build(group)
    before = [term.node for term in group]
    verdict = agrees(before, [replacements[node] for node in before], leaves, gradients=False, mode=validate)
    report(group, verdict.reason)
    if verdict.reason:
        for node in reversed(fresh):
            node.graph.erase_node(node)
        return 0
    for old, new in replacements.items():
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in fresh)
    for old in reversed(list(replacements)):
        if not old.users:
            old.graph.erase_node(old)
    return 1


def _stack_right(group: list[Term]) -> tuple[list[fx.Node], dict[fx.Node, fx.Node]]:
    """H = x [A1; A2]' and its slices of columns."""
    first = group[0].node
    graph, fresh = first.graph, []
    rights = [term.right for term in group]
    with graph.inserting_before(first):
        right = stacked(rights, 1, first)
        whole = made(aten.mm.default, (group[0].left, right[-1]), tensor(group[0].left).new_empty(
            (tensor(group[0].left).shape[0], tensor(right[-1]).shape[1])), first)
        fresh += [*right, whole]
        replacements, start = {}, 0
        for term in group:
            end = start + tensor(term.right).shape[1]
            part = made(aten.slice.Tensor, (whole, 1, start, end), tensor(whole)[:, start:end], term.node)
            part.meta[STACKED] = (whole, start, end)
            fresh.append(part)
            replacements[term.node], start = part, end
    return fresh, replacements


def _stack_left(group: list[Term]) -> tuple[list[fx.Node], dict[fx.Node, fx.Node]]:
    """G = [g1, g2], written side by side, and D = G' x with its slices of rows."""
    inner = [read_product(_untransposed(term.left)) for term in group]
    sources = [term for term in inner if term is not None]
    last = group[-1].node
    graph, fresh = last.graph, []
    total = sum(tensor(term.node).shape[1] for term in sources)
    value = tensor(sources[0].node).new_empty((tensor(sources[0].node).shape[0], total))
    replacements: dict[fx.Node, fx.Node] = {}
    buffer, start, spans = None, 0, []
    with graph.inserting_before(last):
        for term in sources:
            end = start + tensor(term.node).shape[1]
            buffer = made(columns, (buffer, term.left, term.right, term.alpha, start, total), value, term.node)
            fresh.append(buffer)
            spans.append((start, end))
            start = end
        for term, (start, end) in zip(sources, spans, strict=True):
            part = made(aten.slice.Tensor, (buffer, 1, start, end), value[:, start:end], term.node)
            part.meta[STACKED] = (buffer, start, end)
            fresh.append(part)
            replacements[term.node] = part
    shared = group[0].right
    with graph.inserting_before(last):
        across = made(aten.t.default, (buffer,), value.t(), last)
        whole = made(aten.mm.default, (across, shared), tensor(shared).new_empty((total, tensor(shared).shape[1])), last)
        fresh += [across, whole]
        start = 0
        for term in group:
            end = start + tensor(term.node).shape[0]
            part = made(aten.slice.Tensor, (whole, 0, start, end), tensor(whole)[start:end], term.node)
            fresh.append(part)
            replacements[term.node], start = part, end
    return fresh, replacements


def stacked(matrices: Sequence[fx.Node], dim: int, like: fx.Node) -> list[fx.Node]:
    """New nodes, the last of which is the matrices side by side along a dimension.

    Transposed ones are put together as they lie in memory, casts of equal kind are made once.
    """
    if all(node.target is aten.t.default for node in matrices):
        inner = stacked([_untransposed(node) for node in matrices], 1 - dim, like)
        return [*inner, made(aten.t.default, (inner[-1],), tensor(inner[-1]).t(), like)]
    casts = {(node.target, tuple(node.kwargs.items())) for node in matrices}
    if matrices[0].target is aten._to_copy.default and len(casts) == 1 and all(len(node.users) == 1 for node in matrices):
        inner = stacked([_untransposed(node) for node in matrices], dim, like)
        cast = made(aten._to_copy.default, (inner[-1],), tensor(inner[-1]).to(tensor(matrices[0]).dtype), like, **matrices[0].kwargs)
        return [*inner, cast]
    return [made(aten.cat.default, (list(matrices), dim), torch.cat([tensor(node) for node in matrices], dim), like)]
