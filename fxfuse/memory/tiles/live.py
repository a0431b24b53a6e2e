"""How many bytes live while a graph runs, some of its parts in tiles: without running it.

Counted is what the graph makes, what its operations need for themselves while they run, and in a backward graph what was saved for it,
until it was last read. Inputs of the forward are somebody else's, unless accounts say otherwise. Outputs of fused ops that take the
memory of an operand (reuse.py) take none.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce

import torch
from torch import fx

from ...linear_loss.products import accumulator_dtype
from ...products import calls
from ...reuse import DONATED, is_fresh, plan_reuse
from ..costs import scratch_bytes
from ..joint import is_rows, is_tangent
from ..live_bytes import STILL, Accounts, Moving, lies_in, made_by, storage_roots
from ..sizes import Sizes
from .rows import SUMMED, is_array, same
from .segment import Order, Segment

aten = torch.ops.aten
PLACEABLE = (aten.mm.default, calls.product)  # matmuls that can write where they are told


@dataclass(frozen=True)
class Peak:
    """The most bytes, at which step, and what lives there (nodes whose memory it is)."""

    bytes: int
    step: int
    live: tuple[fx.Node, ...]


class Memory:
    """Whose memory each node of a graph lies in, and how long that is wanted."""

    def __init__(self, graph: fx.Graph, sizes: Sizes | None = None) -> None:
        self.graph, self.order, self.sizes = graph, Order(graph), sizes or Sizes()
        self.known: dict[int, list[Segment]] = {}  # parts that were chosen, by the number of tiles
        self._bytes: dict[fx.Node, int] = {}
        self._made: dict[fx.Node, dict[fx.Node, int]] = {}
        self._needs: dict[fx.Node, int] = {}
        self.reuse = plan_reuse(graph)
        self.root = {node: root for node, root in storage_roots(graph, self.reuse).items() if is_array(node)}
        backward = any(is_tangent(node) for node in self.order.nodes)
        self.resident = {node for node in self.root if node.op == "get_attr" or (
            node.op == "placeholder" and (not backward or node.name.startswith("primals")))}
        self.looks = {node: [self.root[used] for used in self.order.reads[node] if used in self.root] for node in self.order.nodes}
        self.aliases: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node, root in self.root.items():
            self.aliases[root].append(node)

    @cached_property
    def untiled(self) -> Peak:
        """The peak of the graph as it is."""
        return self.peak()

    def bytes(self, node: fx.Node) -> int:
        if node not in self._bytes:
            self._bytes[node] = self.sizes.bytes(node.meta["val"])
        return self._bytes[node]

    def _sum_bytes(self, node: fx.Node) -> int:
        """Of a sum over tiles, as it is kept until the last."""
        value = node.meta["val"]
        return self.sizes.elements(value) * accumulator_dtype(value.dtype).itemsize

    def steps(self, segments: Sequence[Segment]) -> list[list[fx.Node]]:
        """The graph's nodes in the order in which they run, those of a segment together."""
        steps = [[node] for node in self.order.nodes]
        for segment in segments:
            inside, above = segment.inside, self._above(segment)
            first = next(i for i, step in enumerate(steps) if step[0] in inside)
            outside = [(i < first or any(above >> self.order.at[n] & 1 for n in step), step)
                       for i, step in enumerate(steps) if step[0] not in inside]
            own = [node for node in segment.nodes if node in inside]
            steps = [*(s for early, s in outside if early), own, *(s for early, s in outside if not early)]
        return steps

    def _above(self, segment: Segment) -> int:
        """What a part needs, as bits."""
        return reduce(operator.or_, (self.order.above[self.order.at[node]] for node in segment.inside))

    def peak(self, segments: Sequence[Segment] = (), fraction: float = 1.0, accounts: Accounts | None = None,
             moving: Moving = STILL) -> Peak:  # fmt: skip
        """The most that lives, with what is ``moving``, if the segments run in tiles of ``fraction`` of the rows. accounts: None for
        the usual ones."""
        steps = self.steps(segments)
        apart = self.resident if accounts is None else self._roots(accounts.foreign)
        elsewhere = set() if accounts is None else self._roots(accounts.uncounted)
        homes = self._homes(segments, elsewhere)
        tiled = {node: segment for segment in segments for node in segment.inside}
        repeated = {node for segment in segments for node in segment.repeated}
        last: dict[fx.Node, int] = {}
        for i, step in enumerate(steps):
            segment = tiled.get(step[0])
            for root in self._looks_of(segment) if segment else self.looks[step[0]]:
                last[homes.get(root, root)] = i
        last |= {homes.get(root, root): len(steps) for root in (() if accounts is None else self._roots(accounts.held))}
        live = {node: self.bytes(node) for node in last if node.op == "placeholder" and node not in apart}
        found, total = Peak(0, 0, ()), moving.start + sum(live.values())
        ending: dict[int, list[fx.Node]] = {}
        for root, i in last.items():
            ending.setdefault(i, []).append(root)
        for i, step in enumerate(steps):
            segment = tiled.get(step[0])
            total += moving.before(step)
            fresh, passing = self._of_segment(segment, fraction) if segment else (self._of_node(step[0]), self._scratch(step[0]))
            for root, size in fresh.items():
                if root in elsewhere:
                    passing += size if segment and size > self.bytes(root) else 0  # a sum, beside what it is rounded to
                    continue
                if root not in last and segment is None and root in repeated:
                    continue  # the tiles make their own
                live[root] = live.get(root, 0) + size
                total += size
            if total + passing > found.bytes:
                found = Peak(total + passing, i, tuple(live))
            for root in ending.get(i, ()):
                total -= live.pop(root, 0)
            for root in fresh:
                if root not in last:
                    total -= live.pop(root, 0)
            total -= moving.after(step)
        return found

    def _homes(self, segments: Sequence[Segment], elsewhere: Collection[fx.Node]) -> dict[fx.Node, fx.Node]:
        """What results of parts that would have memory of their own are written over: it is wanted for as long as they are. (Not of
        what is counted ``elsewhere``.)"""
        homes: dict[fx.Node, fx.Node] = {}
        for segment in sorted(segments, key=lambda s: min(map(self.order.at.__getitem__, s.inside))):
            for result, operand in self.places(segment).items():
                made, home = self.root[result], self.root[operand]
                if made in segment.inside and made not in elsewhere:
                    homes[made] = homes.get(home, home)
        return homes

    def _looks_of(self, segment: Segment) -> set[fx.Node]:
        """Whose memory a part looks at from outside, or leaves something in."""
        return {self.root[node] for node in (*segment.operands, *segment.results) if node in self.root}

    def _roots(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        return {self.root[node] for node in nodes if node in self.root}

    def _of_node(self, node: fx.Node) -> dict[fx.Node, int]:
        """Bytes of the memory that an operation makes; all of its outputs are made at once."""
        if node not in self._made:
            made = [out for out in made_by(node) if self.root.get(out) is out] if node.op == "call_function" else []
            self._made[node] = {out: self.bytes(out) for out in made}
        return self._made[node]

    def _scratch(self, node: fx.Node) -> int:
        """Bytes that an operation needs for itself while it runs."""
        if node not in self._needs:
            self._needs[node] = scratch_bytes(node, self.sizes) if node.op == "call_function" else 0
        return self._needs[node]

    def _of_segment(self, segment: Segment, fraction: float) -> tuple[dict[fx.Node, int], int]:
        """Bytes of its results; and the most that lives of one tile."""
        places, placed = self.places(segment), set()
        fresh: dict[fx.Node, int] = defaultdict(int)
        for node in segment.results:
            if node in places:
                continue
            summed = segment.rows[node] == SUMMED
            fresh[self.root[node]] += self._sum_bytes(node) if summed else self.bytes(node)
            if summed or self.root[node].target in PLACEABLE:
                placed.add(self.root[node])
        return fresh, self._of_tile(segment, fraction, placed)

    def _of_tile(self, segment: Segment, fraction: float, placed: set[fx.Node]) -> int:
        """The most that lives of one tile beyond its rows of what enters and leaves."""
        nodes, own = [node for node in segment.nodes if node in segment.inside], self._own(segment)
        last = {own[used]: i for i, node in enumerate(nodes) for used in self.order.reads[node] if used in own}
        last |= {own[node]: len(nodes) for node in segment.results if node in own}
        live: dict[fx.Node, int] = {}
        most = 0
        for i, node in enumerate(nodes):
            for out in ((node, *node.users) if is_rows(node) else (node,)):
                if own.get(out) is out and out not in placed and out not in live and i <= last.get(out, i):
                    live[out] = int(self.bytes(out) * fraction)
            again = {self.root[n] for n in segment.made_for(node) if n in self.root} & segment.repeated
            most = max(most, sum(live.values()) + sum(map(self.bytes, again)))
            for root in [root for root in live if last.get(root, i) <= i]:
                del live[root]
        return most

    def _own(self, segment: Segment) -> dict[fx.Node, fx.Node]:
        """Whose memory the nodes of a tile lie in, those left out that lie in what enters."""
        dying = {self.root[node] for node in self.dying(segment)}
        own: dict[fx.Node, fx.Node] = {}
        for node in (node for node in segment.nodes if node in segment.inside):
            source = lies_in(node, self.reuse) if node in self.root else None
            if source is not None and source in segment.inside:
                if source in own:
                    own[node] = own[source]
            elif node in self.root and (source is None or (self._is_stored(node) and self.root[source] not in dying)):
                own[node] = node
        return own

    @staticmethod
    def _is_stored(node: fx.Node) -> bool:
        """Is a value, which a fused op stores where an operand lay, rather than a look at the operand."""
        return node.target is operator.getitem and is_rows(node.args[0])

    def places(self, segment: Segment) -> dict[fx.Node, fx.Node]:
        """Results that may lie where an operand lay: fresh memory laid out alike, which nothing reads after the segment."""
        found: dict[fx.Node, fx.Node] = {}
        dying = self.dying(segment)
        results = [node for node in segment.results if segment.rows[node] != SUMMED]
        # Where a fused op would write, or a sum is written over, comes first.
        for result in sorted(results, key=lambda n: self.root[n] in segment.inside):
            fitting = [n for n in dying if n not in found.values() and segment.rows[n] == segment.rows[result] and _alike(n, result)]
            if fitting:
                found[result] = min(fitting, key=lambda n: self.root[n] is not self.root[result])
        return found

    def dying(self, segment: Segment) -> list[fx.Node]:
        """Operands with rows that lie in memory of the graph's own which nothing reads afterwards: a tile may overwrite its part."""
        return [node for node in segment.varying if self._dies_in(node, segment)]

    def _dies_in(self, node: fx.Node, segment: Segment) -> bool:
        root = self.root[node]
        if not (root.meta.get(DONATED) if root.op == "placeholder" else is_fresh(root)):
            return False
        above = self._above(segment)
        outside = [a for a in self.aliases[root] if a not in segment.inside]
        entering = [a for a in outside if a in segment.operands]
        if len(entering) != 1:
            return False
        first = min(map(self.order.at.__getitem__, segment.inside))
        return all(user in segment.inside or user in outside or self.order.at[user] < first or above >> self.order.at[user] & 1
                   for alias in outside for user in alias.users)


def _alike(a: fx.Node, b: fx.Node) -> bool:
    """Same shape, strides and dtype, for all sizes."""
    x, y = a.meta["val"], b.meta["val"]
    return x.dtype == y.dtype and x.dim() == y.dim() and all(
        same(p, q) for p, q in zip((*x.shape, *x.stride()), (*y.shape, *y.stride()), strict=True))
