"""A part of a graph that runs over tiles of rows: which operations, and what enters and leaves it.

The part is convex (nothing outside lies between two of its operations), each operation in it is separable (relations.py), and the rows
of all tensors agree. It grows by operations, each with what lies between it and the rest.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from torch import Tensor, fx

from ..joint import is_view
from ..sizes import Sizes, is_symbolic
from .relations import relate
from .rows import SUMMED, WHOLE, Rows, is_array, same, shape_of


class Order:
    """Where each node of a graph stands, and what it is made of: sets of nodes as bits of an int."""

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = list(graph.nodes)
        self.at = {node: i for i, node in enumerate(self.nodes)}
        self.above = [0] * len(self.nodes)  # ancestors
        self.reads = {node: node.all_input_nodes for node in self.nodes}
        self._packed: dict[fx.Node, bool] = {}
        for i, node in enumerate(self.nodes):
            for used in self.reads[node]:
                self.above[i] |= self.above[self.at[used]] | 1 << self.at[used]
        self.below = [0] * len(self.nodes)  # descendants
        for i, node in reversed(list(enumerate(self.nodes))):
            for user in node.users:
                self.below[i] |= self.below[self.at[user]] | 1 << self.at[user]

    def packed(self, node: fx.Node) -> bool:
        """Is a tensor contiguous for all sizes."""
        if node not in self._packed:
            self._packed[node] = _is_packed(node.meta["val"])
        return self._packed[node]

    def of(self, bits: int) -> list[fx.Node]:
        return [self.nodes[i] for i in range(bits.bit_length()) if bits >> i & 1]

    def bits(self, nodes: Iterable[fx.Node]) -> int:
        return sum(1 << self.at[node] for node in nodes)

    def between(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        """What lies on a way from one of the nodes to another."""
        above = below = own = 0
        for node in nodes:
            i = self.at[node]
            above, below, own = above | self.above[i], below | self.below[i], own | 1 << i
        return self.of(above & below & ~own)


def unit(node: fx.Node) -> list[fx.Node]:
    """An operation with the nodes that take its results apart."""
    op: Any = node.args[0] if node.target is operator.getitem else node
    return [op, *(user for user in op.users if user.target is operator.getitem)]


@dataclass(frozen=True)
class Segment:
    """inside:   its nodes
    rows:     of every tensor that these read or make
    repeated: nodes that are the same for all rows and made again in each tile, for each operation that reads them; if somebody else
              does too, they stay where they are as well
    """

    order: Order
    inside: frozenset[fx.Node]
    rows: dict[fx.Node, Rows]
    repeated: frozenset[fx.Node] = frozenset()

    @classmethod
    def around(cls, order: Order, node: fx.Node) -> Segment | None:
        """An operation alone; its rows are those dimensions of a tensor that differ from call to call (else all but the last), or one
        of them, as far as it is separable over them."""
        op = unit(node)[0]
        tensors = [n for n in (node, *op.all_input_nodes) if is_array(n)]
        for tensor in sorted(tensors, key=lambda n: (not is_symbolic(n.meta["val"]), n is not node)):
            shape = shape_of(tensor)
            dims = [d for d in range(len(shape)) if not same(shape[d], 1)]
            varying = [d for d in dims if not isinstance(shape[d], int)]
            for rows in _neighbouring(varying or dims[:-1]):
                segment = cls(order, frozenset(), {tensor: rows}).with_node(op)
                if segment is not None:
                    return segment
        return None

    def with_node(self, node: fx.Node) -> Segment | None:
        """With one more operation and all that lies between; None if that cannot be."""
        inside, rows = set(self.inside), dict(self.rows)
        pending = [node]
        while pending:
            nodes = unit(pending.pop())
            relation = relate(nodes[0], rows)
            if relation is None or any(rows.setdefault(n, r) != r for n, r in relation.items()):
                return None
            if any(rows.get(n) == WHOLE for n in nodes):
                return None
            inside.update(nodes)
            between = self.order.between(inside)
            # One that reads or makes something whose rows are known comes next; what lies between is reached from there.
            near = [n for n in between if n in rows or any(m in rows for m in (*unit(n), *n.all_input_nodes))]
            if between and not near:
                return None
            pending += near[:1]
        return Segment(self.order, frozenset(inside), rows)

    def until(self, node: fx.Node) -> Segment:
        """Without an operation and what depends on it."""
        below = self.order.below[self.order.at[node]]
        return self._without(n for n in self.inside if n is node or below >> self.order.at[n] & 1)

    def after(self, node: fx.Node) -> Segment:
        """Without an operation and what it depends on."""
        above = self.order.above[self.order.at[node]]
        return self._without(n for n in self.inside if n is node or above >> self.order.at[n] & 1)

    def _without(self, nodes: Iterable[fx.Node]) -> Segment:
        gone = {part for node in nodes for part in unit(node)}
        return Segment(self.order, self.inside - gone, self.rows)

    def without_first_views(self) -> Segment:
        """With views of what enters left outside, where they cost nothing: then the views enter, and tell of sizes that their sources
        do not have (results laid out like them can be allocated, and may lie in their memory)."""
        kept = set(self.inside)
        for node in self.nodes:
            if is_view(node) and node.args[0] not in kept and node.args[0] not in self.repeated:
                kept.discard(node)
        return self if len(kept) == len(self.inside) else Segment(self.order, frozenset(kept), self.rows)

    def with_repeated(self, repeatable: Callable[[fx.Node], bool]) -> Segment:
        """With operations made again in each tile for which that is cheap, and with what is made of their results for this part
        alone."""
        found: set[fx.Node] = set()
        for node in reversed(self.order.nodes):
            needed = any(user in found or user in self.inside for user in node.users)
            if needed and node.op == "call_function" and node not in self.inside and not self.rows.get(node, WHOLE) and (
                    repeatable(node) or (found | self.inside).issuperset(node.users)):
                found.add(node)
        kept: set[fx.Node] = set()
        for node in self.order.nodes:  # those that hang on such an operation
            if node in found and (repeatable(node) or any(used in kept for used in self.order.reads[node])):
                kept.add(node)
        return Segment(self.order, self.inside, self.rows, frozenset(kept))

    def without_repeated(self) -> Segment:
        """With what is whole made before the first tile."""
        return Segment(self.order, self.inside, self.rows)

    @cached_property
    def nodes(self) -> list[fx.Node]:
        return sorted(self.inside | self.repeated, key=self.order.at.__getitem__)

    @cached_property
    def operands(self) -> list[fx.Node]:
        """What enters: tensors and sizes."""
        own = self.inside | self.repeated
        return list(dict.fromkeys(used for node in self.nodes for used in self.order.reads[node] if used not in own))

    @cached_property
    def results(self) -> list[fx.Node]:
        """What leaves, each in memory of its own: views of it are taken outside."""
        return list(dict.fromkeys(_base(node, self.inside) for node in self.leaving))

    def made_for(self, node: fx.Node) -> list[fx.Node]:
        """What is made again for an operation, in order."""
        found: set[fx.Node] = set()
        pending = [used for used in self.order.reads[node] if used in self.repeated]
        while pending:
            found.add(used := pending.pop())
            pending += [source for source in self.order.reads[used] if source in self.repeated and source not in found]
        return sorted(found, key=self.order.at.__getitem__)

    @cached_property
    def leaving(self) -> list[fx.Node]:
        """Nodes that something outside reads."""
        return [node for node in self.nodes
                if node in self.inside and is_array(node) and any(user not in self.inside for user in node.users)]

    @property
    def varying(self) -> list[fx.Node]:
        """Operands of which a tile reads its rows."""
        return [node for node in self.operands if self.rows.get(node, WHOLE) != WHOLE]

    def fits(self) -> bool:
        """Can its results be allocated before its first tile: sums of known sizes, and rows laid out as the tiles write them."""
        return bool(self.varying) and all(self._allocatable(node) for node in self.results)

    def _allocatable(self, node: fx.Node) -> bool:
        value: Tensor = node.meta["val"]
        if self.rows[node] == SUMMED:
            return value.is_floating_point() and all(isinstance(size, int) for size in value.shape)
        shape, rows = shape_of(node), self.rows[node]
        known = [isinstance(size, int) for d, size in enumerate(shape) if d not in rows]
        return self.order.packed(node) and all(known) and (len(rows) == 1 or self.like(node) is not None)

    def like(self, result: fx.Node) -> fx.Node | None:
        """An operand whose rows have the sizes of a result's, where the rows are several dimensions."""
        sizes = [shape_of(result)[d] for d in self.rows[result]]
        for node in self.varying:
            rows = self.rows[node]
            if len(rows) == len(sizes) and all(same(shape_of(node)[d], s) for d, s in zip(rows, sizes, strict=True)):
                return node
        return None

    def tokens(self, sizes: Sizes) -> int:
        """How many rows there are."""
        node = self.varying[0]
        return prod(sizes.number(shape_of(node)[d]) for d in self.rows[node])


def _neighbouring(dims: list[int]) -> list[Rows]:
    """All dimensions, then each alone."""
    candidates = [tuple(dims), *((d,) for d in dims)]
    return list(dict.fromkeys(rows for rows in candidates if rows and rows[-1] - rows[0] == len(rows) - 1))


def _base(node: fx.Node, inside: frozenset[fx.Node]) -> fx.Node:
    """What a node is a view of, inside."""
    while is_view(node) and node.args[0] in inside:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _is_packed(value: Tensor) -> bool:
    """Is a tensor contiguous for all sizes."""
    expected: Any = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if not same(size, 1) and not same(stride, expected):
            return False
        expected = expected * size
    return True
