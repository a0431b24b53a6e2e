"""Reads of rows at indices that are a permutation, or a permutation divided by a number, proven by where the indices come from.

    perm    = sort(ids)[1] or argsort(ids), ids [s]         each of 0 .. s-1 once
    inverse = perm's: an arange written to the places perm  perm[inverse] = 0 .. s-1
    perm // k, s = t k                                      each of 0 .. t-1 exactly k times, i at the places inverse[i k : i k + k]

    x[perm // k]                    -> spread(x, perm // k, inverse, k)
    x[perm], y[inverse]             -> the same with k = 1
    y[inverse].view(t, k, ..).sum(1)  -> collect(y, perm // k, inverse, k)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import fx

from ..canonical.facts import (
    dtype_of,
    known_shape,
    known_tensor,
    module_path,
    same_size,
    static_size,
    tensor_of,
)
from ..canonical.vocabulary import aten
from ..lowering import implementation_on
from ..regions.region import call
from ..reporting.records import Site
from ..surgery import erase_dead
from .op import collect_rows, spread_rows

RULE = "row_selection"
_SORTS = (torch.sort, aten.sort.default)
_ARGSORTS = (torch.argsort, aten.argsort.default)
_DIVISIONS = (operator.floordiv, torch.floor_divide, aten.floor_divide.default)
_EMPTY = (torch.empty_like, torch.zeros_like, aten.empty_like.default, aten.zeros_like.default)
_ARANGES = (torch.arange, aten.arange.default)
_SUMS = (torch.sum, aten.sum.dim_IntList)


@dataclass
class Permutation:
    """A permutation in a graph; ``inverse``: the node that lists where each number stands, made when first asked for."""

    node: fx.Node
    made: fx.Node | None = None

    def inverse(self, graph: fx.Graph) -> fx.Node:
        if self.made is None:
            with graph.inserting_after(self.node):
                size = size_of(graph, self.node)
                places = call(graph, self.node, aten.empty_like.default, self.node)
            if isinstance(size, fx.Node):
                places.prepend(size)
            with graph.inserting_after(places):
                numbers = graph.call_function(torch.arange, (size,), {"device": known_tensor(self.node).device})
            numbers.meta = dict(places.meta)
            with graph.inserting_after(numbers):
                self.made = call(graph, self.node, aten.scatter.src, places, 0, self.node, numbers)
        return self.made


def select_rows(gm: fx.GraphModule, differentiable: Callable[[], Collection[fx.Node]], use: Callable[[str], str]) -> list[Site]:
    """Replace what is found in a graph, in place; one site for all reads that one permutation orders."""
    permutations = [Permutation(node) for node in gm.graph.nodes if _is_permutation(node) and not _is_of_permutation(node)]
    if not permutations:
        return []
    trained, sites = differentiable(), []
    for permutation in permutations:
        reads = [read for read in _reads(gm.graph, permutation) if read[0] in trained]
        if not reads:
            continue
        site = Site(RULE, module_path(permutation.node), "declined", use(RULE))
        sites.append(site)
        if not site.reason:
            for read, source, k, inverted in reads:
                _replace(gm.graph, permutation, read, source, k, inverted)
            device = known_tensor(permutation.node).device.type
            site.status, site.implementation = "fused", f"reads and {implementation_on(device)} sums"
    erase_dead(gm.graph)
    return sites


def size_of(graph: fx.Graph, node: fx.Node) -> fx.Node | int:
    """The length of a vector, as a number or a node that is inserted here."""
    return static_size(known_shape(node)[0]) or call(graph, node, aten.sym_size.int, node, 0)


def _is_permutation(node: fx.Node) -> bool:
    tensor = tensor_of(node)
    if tensor is None or tensor.dim() != 1 or tensor.dtype != torch.int64:
        return False
    if node.target is operator.getitem and node.args[1] == 1:
        sort = node.args[0]
        return isinstance(sort, fx.Node) and (sort.target in _SORTS or (sort.op == "call_method" and sort.target == "sort"))
    return node.target in _ARGSORTS or (node.op == "call_method" and node.target == "argsort")


def _is_of_permutation(node: fx.Node) -> bool:
    """The argsort of a permutation is its inverse, and found with it."""
    return bool(node.args) and isinstance(node.args[0], fx.Node) and node.op != "placeholder" and node.target is not operator.getitem \
        and _is_permutation(node.args[0])


Read = tuple[fx.Node, fx.Node, int, bool]


def _reads(graph: fx.Graph, permutation: Permutation) -> list[Read]:
    """(the read, its indices, how often each row is read, whether the indices are the inverse)."""
    found: list[Read] = []
    perm = permutation.node
    divided = [user for user in perm.users if user.target in _DIVISIONS and user.args[0] is perm and not user.kwargs]
    sources = [(perm, 1)] + [(user, user.args[1]) for user in divided if isinstance(user.args[1], int)]
    for source, k in sources:
        for user in source.users:
            rows = _read_at(user, source)
            if rows is not None and k > 0 and same_size(known_shape(rows)[0] * k, known_shape(perm)[0]):
                found.append((user, source, k, False))
    for inverse in _inverses(perm):
        for user in inverse.users:
            rows = _read_at(user, inverse)
            if rows is not None and same_size(known_shape(rows)[0], known_shape(perm)[0]):
                found.append((user, inverse, 1, True))
    return found


def _read_at(node: fx.Node, index: fx.Node) -> fx.Node | None:
    """What ``node`` reads rows of at ``index``, if it does."""
    rows: object = None
    if node.target is operator.getitem and node.args[1] is index:
        rows = node.args[0]
    elif node.target is aten.index.Tensor and list(node.args[1]) == [index]:  # type: ignore[arg-type]
        rows = node.args[0]
    elif node.target in (torch.index_select, aten.index_select.default) and node.args[1:] == (0, index) and not node.kwargs:
        rows = node.args[0]
    tensor = tensor_of(rows)
    return rows if isinstance(rows, fx.Node) and tensor is not None and tensor.is_floating_point() and tensor.dim() > 0 else None


def _inverses(perm: fx.Node) -> list[fx.Node]:
    """Vectors that are written once, an arange at the places of the permutation, before anything reads them."""
    found = [user for user in perm.users if user.args == (perm,) and not user.kwargs
             and (user.target in _ARGSORTS or (user.op == "call_method" and user.target == "argsort"))]
    for user in perm.users:
        if user.target is not operator.setitem or user.args[1] is not perm:
            continue
        places, _, numbers = user.args
        if not isinstance(places, fx.Node) or places.target not in _EMPTY or not _counts_to(numbers, perm):
            continue
        order = {node: i for i, node in enumerate(perm.graph.nodes)}
        others = [other for other in places.users if other is not user]
        if dtype_of(places) == torch.int64 and all(order[other] > order[user] and _only_reads(other, places) for other in others):
            found.append(places)
    return found


def _counts_to(numbers: object, perm: fx.Node) -> bool:
    """Is it 0, 1, 2, ... for each element of the permutation."""
    if not isinstance(numbers, fx.Node) or numbers.target not in _ARANGES or len(numbers.args) != 1:
        return False
    return dtype_of(numbers) == torch.int64 and same_size(known_shape(numbers)[0], known_shape(perm)[0])


def _only_reads(user: fx.Node, places: fx.Node) -> bool:
    return _read_at(user, places) is not None and user.args[0] is not places


def _replace(graph: fx.Graph, permutation: Permutation, read: fx.Node, source: fx.Node, k: int, inverted: bool) -> None:
    inverse = permutation.inverse(graph)
    rows = _read_at(read, source)
    summed, times = _summed(read) if inverted else (None, 0)
    old = summed or read
    with graph.inserting_before(old):
        if summed is not None:
            quotient = permutation.node if times == 1 else call(graph, old, aten.floor_divide.default, permutation.node, times)
            new = call(graph, old, collect_rows, rows, quotient, inverse, times)
        elif inverted:
            new = call(graph, old, spread_rows, rows, inverse, permutation.node, 1)
        else:
            new = call(graph, old, spread_rows, rows, source, inverse, k)
    old.replace_all_uses_with(new)
    for node in (old, *([old.args[0], read] if summed is not None else [])):
        if isinstance(node, fx.Node) and not node.users:
            graph.erase_node(node)
    _erase_write(graph, source)


def _erase_write(graph: fx.Graph, places: fx.Node) -> None:
    """The write of an inverse that nothing reads any more goes, and with it what it wrote to."""
    writes = list(places.users)
    if places.target in _EMPTY and len(writes) == 1 and writes[0].target is operator.setitem and not writes[0].users:
        graph.erase_node(writes[0])
        graph.erase_node(places)


def _summed(read: fx.Node) -> tuple[fx.Node | None, int]:
    """(the sum of each k rows that a read is only used for, k): reshape to [t, k, ...], then sum over dimension 1."""
    if len(read.users) != 1:
        return None, 0
    shaped = next(iter(read.users))
    if not _is_reshape(shaped) or len(shaped.users) != 1:
        return None, 0
    whole, parts = known_shape(read), known_shape(shaped)
    k = static_size(parts[1]) if len(parts) == len(whole) + 1 else None
    if not k or not all(same_size(a, b) for a, b in zip(parts[2:], whole[1:], strict=True)):
        return None, 0
    total = next(iter(shaped.users))
    if not _is_sum_over_1(total, shaped) or dtype_of(total) != dtype_of(read):
        return None, 0
    return total, k


def _is_sum_over_1(node: fx.Node, of: fx.Node) -> bool:
    if node.target not in _SUMS and not (node.op == "call_method" and node.target == "sum"):
        return False
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    keepdim = node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False)
    more = set(node.kwargs) - {"dim", "keepdim"} or len(node.args) > 3
    return node.args[0] is of and dims in (1, [1], (1,), -2, [-2], (-2,)) and keepdim is False and not more \
        and (dims in (1, [1], (1,)) or len(known_shape(of)) == 3)


def _is_reshape(node: fx.Node) -> bool:
    """The canonical word, or one that canonicalization left as it was written."""
    return node.target in (aten.reshape.default, aten.view.default) or (
        node.op == "call_method" and node.target in ("view", "reshape", "unflatten"))
