"""Two thin products of one large matrix are one call, which can read the matrix once.

    g = s dY B   and   dB = s dY' h       ->   g, dB = thin_pair(dY, B, h)

Both are gradients of one low-rank term. The call stands where g stood. A dB that is only cast to float32 (the gradient of an adapter
kept in float32) is float32 at once.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import fx

from .calls import SHORT, accumulate, columns, product, thin_pair
from .check import agrees
from .terms import is_tensor, is_thin, made, matrix_source, read_product, size, tensor

aten = torch.ops.aten


class Across(NamedTuple):
    """``alpha * matrix @ right``, into columns from ``start`` of a buffer of ``width``, or (no buffer) a new one."""

    node: fx.Node
    matrix: fx.Node
    right: fx.Node
    alpha: float
    buffer: fx.Node | None
    start: int
    width: int


class Down(NamedTuple):
    """``beta * matrix' @ left``."""

    node: fx.Node
    left: fx.Node
    beta: float


def pair_thin_products(graph: fx.Graph, validate: str) -> int:
    """In place; returns how many pairs."""
    downs: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        matrix = _read_down(node)[0]
        if matrix is not None:
            downs[matrix].append(node)
    order = {node: i for i, node in enumerate(graph.nodes)}
    count = 0
    for node in list(graph.nodes) if downs else []:
        across = None if node._erased else _read_across(node)
        partner = None if across is None else _partner(across, downs[across.matrix], order)
        if across is not None and partner is not None and _replace(across, partner, validate):
            downs[across.matrix].remove(partner.node)
            count += 1
    return count


def place_thin_products(graph: fx.Graph) -> int:
    """On a graph for a GPU that nothing looks into any more: each thin product remembers what was chosen for it. Returns how many."""
    from ..kernels.thin_sites import accumulating_site, added_product_site, pair_site, product_site

    count = 0
    for node in graph.nodes:
        if node.target is thin_pair:
            node.target = pair_site()
        elif node.target is product and (size(node.args[1], 0) or SHORT + 1) <= SHORT and tensor(node).dtype.itemsize == 2:
            node.target = product_site()
        elif _is_short_sum(node, aten.addmm.default):
            node.target, node.args, node.kwargs = added_product_site(), (*node.args[:3], node.kwargs.get("alpha", 1.0)), {}
        elif _is_short_sum(node, accumulate):
            node.target = accumulating_site()
        else:
            continue
        count += 1
    return count


def _is_short_sum(node: fx.Node, target: Any) -> bool:
    """Is this a matrix and a product over a short contraction, in 16 bits (a bias is a row)."""
    if node.target is not target or "beta" in node.kwargs or tensor(node).dtype.itemsize != 2:
        return False
    base, left, right = node.args[:3]
    short = (size(right, 0) or SHORT + 1) <= SHORT  # type: ignore[arg-type]
    return short and tensor(base).dim() == 2 and {tensor(n).dtype for n in (base, left, right)} == {tensor(node).dtype}  # type: ignore[arg-type]


def _read_across(node: fx.Node) -> Across | None:
    found = None
    if node.op == "call_function" and node.target is columns:
        buffer, matrix, right, alpha, start, width = node.args
        found = Across(node, matrix, right, alpha, buffer, start, width)  # type: ignore[arg-type]
    else:
        term = read_product(node)
        width = None if term is None else size(term.right, 1)
        if term is not None and width is not None:
            found = Across(node, term.left, term.right, term.alpha, None, 0, width)
    return found if found is not None and _fits(found.matrix, found.right) else None


def _fits(matrix: fx.Node, right: fx.Node) -> bool:
    """Are these a large 16-bit matrix and a thin one."""
    rank = size(right, 1)
    return (tensor(matrix).dtype.itemsize == 2 and rank is not None and rank <= SHORT and is_thin(rank, size(right, 0))
            and is_thin(rank, size(matrix, 0) or SHORT * SHORT))  # fmt: skip


def _read_down(node: fx.Node) -> tuple[fx.Node | None, Down | None]:
    term = read_product(node)
    if term is None or term.left.target is not aten.t.default:
        return None, None
    return term.left.args[0], Down(node, term.right, term.alpha)  # type: ignore[return-value]


def _partner(across: Across, downs: list[fx.Node], order: dict[fx.Node, int]) -> Down | None:
    """A product of the same matrix across, of the same rank, whose other factor is there when the first product is taken."""
    for node in downs:
        down = _read_down(node)[1]
        if (down is not None and size(down.left, 1) == size(across.right, 1) and tensor(down.left).dtype == tensor(across.matrix).dtype
                and down.left in order and order[down.left] < order[across.node]):  # fmt: skip
            return down
    return None


def _replace(across: Across, down: Down, validate: str) -> int:
    graph, node, result = across.node.graph, across.node, _widened(down.node)
    wide = result is not down.node
    args = (across.buffer, across.start, across.width, across.matrix, across.right, down.left, across.alpha, down.beta, wide)
    values = (tensor(node), tensor(result))
    with graph.inserting_before(node):
        both = made(thin_pair, args, values, node)
        first = made(operator.getitem, (both, 0), values[0], node)
        second = made(operator.getitem, (both, 1), values[1], result)
    leaves = [across.matrix, matrix_source(across.right), down.left, *([] if across.buffer is None else [across.buffer])]
    own = [_own_columns(across, node), _own_columns(across, first)]
    verdict = agrees([own[0], result], [own[1], second], list(dict.fromkeys(leaves)), gradients=False, mode=validate)
    for fresh in (*own, *((second, first, both) if verdict.reason else ())):
        graph.erase_node(fresh)
    if verdict.reason:
        return 0
    node.replace_all_uses_with(first)
    result.replace_all_uses_with(second)
    for old in dict.fromkeys((node, result, down.node)):
        graph.erase_node(old)
    return 1


def _widened(node: fx.Node) -> fx.Node:
    """The cast to float32 of a result that nothing else reads, or the result."""
    user = next(iter(node.users)) if len(node.users) == 1 else node
    if user.target is aten._to_copy.default and is_tensor(user) and tensor(user).dtype == torch.float32 \
            and tensor(user).device == tensor(node).device and "memory_format" not in user.kwargs:  # fmt: skip
        return user
    return node


def _own_columns(across: Across, result: fx.Node) -> fx.Node:
    """What the product wrote of its buffer; other columns may not have been written yet."""
    end = across.start + (size(across.right, 1) or 0)
    with result.graph.inserting_after(result):
        return made(aten.slice.Tensor, (result, 1, across.start, end), tensor(result)[:, across.start : end], result)
