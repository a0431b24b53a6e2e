"""Which parts of a graph are worth running in tiles: those around what lives when the most lives.

A part begins with one operation that reads or makes something large at the peak, and grows so that large tensors come to lie inside
it, where only a tile of them ever exists: it takes in what makes one and all that reads it. Of the parts on this way it is the one
with the lowest peak of the whole graph, or else with the fewest products. With the peak lower, another place may be the
peak: then that gets a part of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from math import inf
from typing import NamedTuple

from torch import fx

from ...products import calls
from ...quantized_op import is_dequantization
from ..joint import is_view
from .live import Memory, aten
from .rows import SUMMED
from .segment import Segment, unit

# Operations whose time depends on over how many rows they run.
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, calls.product, calls.accumulate, calls.columns, calls.thin_pair)
FEW, USUAL = 4, (8, 32)  # tiles, for which parts are looked for; with other numbers they are mostly the same
SCARCE = 8  # tiles; who wants fewer wants time, and weights are dequantized once for all of them
MOST = 4  # parts of one graph
SEEDS = 8  # operations to begin with, at one peak
SHARE = 8  # what is this much smaller than the largest tensor at the peak is not worth growing for
LEAST = 0.01  # of the peak, to be gained by a part
NEARLY = 200  # peaks that differ by less than this part of the untiled one are equal
MOVES = 32  # large tensors that a part tries to take in
REPEATED = 0.05  # of the peak: what weights may cost that are dequantized once and not for each tile


class Way(NamedTuple):
    """How parts run, while they are looked for. ``fraction``: of the rows, in a tile. ``repeat``: weights are dequantized again for
    each tile, and one at a time; else once before the first tile, and all those of a part live at once."""

    fraction: float
    repeat: bool

    def of(self, segment: Segment) -> Segment:
        """The part as it would run."""
        return segment.with_repeated(is_dequantization) if self.repeat else segment


def choose_parts(memory: Memory, count: int) -> list[Segment]:
    """Parts to run in so many tiles; none if that saves nothing."""
    found: list[Segment] = []
    least = memory.untiled.bytes * (1 - LEAST)
    for usual in () if count < 2 else (FEW,) if count < SCARCE else USUAL:
        if usual not in memory.known:
            memory.known[usual] = _chosen(memory, Way(1 / usual, repeat=usual >= SCARCE))
        parts = memory.known[usual]
        peak = memory.peak(parts, 1 / count).bytes
        if peak < least:
            found, least = parts, peak
        if count <= usual:
            break
    return found


def _chosen(memory: Memory, way: Way) -> list[Segment]:
    chosen: list[Segment] = []
    peak = memory.untiled.bytes
    while len(chosen) < MOST:
        best = None
        for candidate in _candidates(memory, chosen, way):
            found = memory.peak([*chosen, candidate], way.fraction).bytes
            if found < (peak if best else peak * (1 - LEAST)):
                best, peak = candidate, found
        if best is None:
            break
        chosen.append(best)
    return _hoisted(memory, chosen, way.fraction) if way.repeat else chosen


def _hoisted(memory: Memory, chosen: Sequence[Segment], fraction: float) -> list[Segment]:
    """The same parts, weights dequantized once for all tiles where that hardly costs memory."""
    result, most = list(chosen), memory.peak(chosen, fraction).bytes * (1 + REPEATED)
    for i, segment in enumerate(chosen):
        trial = [*result[:i], segment.without_repeated(), *result[i + 1 :]]
        if memory.peak(trial, fraction).bytes <= most:
            result = trial
    return result


def _candidates(memory: Memory, chosen: Sequence[Segment], way: Way) -> Iterator[Segment]:
    taken = {node for segment in chosen for node in segment.inside}
    seen: set[frozenset[fx.Node]] = set()
    grown = []
    for seed in islice(_seeds(memory, chosen, way.fraction), SEEDS):
        segment = Segment.around(memory.order, seed)
        if segment is not None and taken.isdisjoint(segment.inside):
            grown.append(_grown(memory, chosen, segment, taken, way, seen))
    return (segment for segment in grown if segment.fits())


def _seeds(memory: Memory, chosen: Sequence[Segment], fraction: float) -> Iterator[fx.Node]:
    """Operations that make or read what lives at the peak, the largest first."""
    given: set[fx.Node] = set()
    live = sorted(memory.peak(chosen, fraction).live, key=lambda node: -memory.bytes(node))
    for root in live:
        if memory.bytes(root) * SHARE < memory.bytes(live[0]):
            return
        for alias in memory.aliases[root]:
            for node in (alias, *alias.users):
                op = unit(node)[0]
                if op.op == "call_function" and not is_view(op) and op not in given:
                    given.add(op)
                    yield op


def _grown(memory: Memory, chosen: Sequence[Segment], segment: Segment, taken: set[fx.Node], way: Way,
           seen: set[frozenset[fx.Node]]) -> Segment:
    """The part with as much around it as helps: it takes in one large tensor of its border after the other, whether or not that
    helps at once, and the best of all these parts is kept. Where it becomes a part that has been ``seen``, that has grown already."""
    best, least = segment, _cost(memory, chosen, segment, way)
    tried: set[fx.Node] = set()
    while len(tried) < MOVES:
        border = sorted(_border(segment), key=lambda node: -memory.bytes(node))
        node = next((node for node in border if node not in tried and memory.bytes(node) * SHARE >= memory.bytes(border[0])), None)
        if node is None:
            break
        tried.add(node)
        larger = _with_inside(segment, node)
        if larger.inside == segment.inside or not taken.isdisjoint(larger.inside):
            continue
        if larger.inside in seen:
            break
        seen.add(larger.inside)
        segment = larger
        bare = segment.without_first_views()
        for form in (segment,) if bare is segment else (segment, bare):
            cost = _cost(memory, chosen, form, way)
            if cost < least:
                best, least = form, cost
    return way.of(_pruned(memory, chosen, best, least, way))


def _pruned(memory: Memory, chosen: Sequence[Segment], segment: Segment, least: tuple, way: Way) -> Segment:
    """The part without products that it does not need: one is left out with all that comes after it, or before."""
    for node in reversed(segment.nodes):
        if node.target in PRODUCTS and node in segment.inside:
            for smaller in (segment.until(node), segment.after(node)):
                cost = _cost(memory, chosen, smaller, way) if smaller.inside else least
                if cost < least:
                    segment, least = smaller, cost
    return segment


def _cost(memory: Memory, chosen: Sequence[Segment], segment: Segment, way: Way) -> tuple[float, int, int]:
    """The peak, the number of products inside, and bytes of the border."""
    segment = way.of(segment)
    if not segment.fits():
        return inf, 0, 0
    peak, border = memory.peak([*chosen, segment], way.fraction).bytes, sum(memory.bytes(node) for node in _border(segment))
    products = sum(node.target in PRODUCTS for node in segment.inside)
    return peak // (memory.untiled.bytes // NEARLY + 1), products, border


def _border(segment: Segment) -> list[fx.Node]:
    """Tensors of which all rows exist when the part begins or ends."""
    return list(dict.fromkeys([*segment.varying, *(node for node in segment.results if segment.rows[node] != SUMMED)]))


def _with_inside(segment: Segment, node: fx.Node) -> Segment:
    """The part with what makes a tensor, through views, and with all that reads it, as far as that can be."""
    for alias in (node, *_sources(node)):
        if alias.op == "call_function" and not segment.inside.issuperset(unit(alias)):
            segment = segment.with_node(alias) or segment
    pending = [node, *_sources(node)]
    while pending:
        for user in pending.pop().users:
            if user.op == "call_function" and user not in segment.inside:
                segment = segment.with_node(user) or segment
            if is_view(user) and user in segment.inside:
                pending.append(user)
    return segment


def _sources(node: fx.Node) -> list[fx.Node]:
    """What a node is a view of."""
    found = []
    while is_view(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        found.append(node)
    return found
