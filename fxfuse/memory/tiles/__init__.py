"""Parts of a partitioned graph that run over tiles of rows, so that what is wide in them never exists whole.

An MLP's gate, up and product are four to six times as wide as what enters and leaves it; so are their gradients. All of them can be
computed for some rows, used, and forgotten, before the next rows. Which operations those are is read off the graph: what each makes
of rows (relations.py), what lives when (live.py), and what lies around what is large then (choose.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import fx

from ...linear_loss.chunks import units_of
from ..costs import USUAL, Rates, rates_of
from ..live_bytes import STILL, Accounts, Moving
from ..sizes import Sizes
from .body import Body, insert
from .choose import choose_parts
from .live import Memory, Peak
from .loop import STEP
from .price import best_rows, extra_ms, graph_ms
from .segment import Segment

__all__ = ["Memory", "TileReport", "peak_in", "priced", "tile", "tile_freely", "tiled_peak"]

# Where tiles are free: numbers of tiles, rows of one at least, part of the graph's time, part of the peak that may remain.
FREE_COUNTS, FREE_ROWS, FREE_TIME, FREE_GAIN = (2, 3, 4), 1024, 0.005, 0.9
_COUNTS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


@dataclass
class TileReport:
    """What ``tile`` did.

    segments:     of each part: (operations, rows of a tile, tiles at the sizes of the call that was compiled)
    bytes_before: the most that lived in the graph (beyond the forward's inputs and weights), bytes_after: that lives now
    sources:      the code of the tiles, for reading
    """

    bytes_before: int
    bytes_after: int
    segments: list[tuple[int, int, int]] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)


def tile(gm: fx.GraphModule, *, limit_bytes: int | None = None, tiles: int | None = None, sizes: Sizes | None = None) -> TileReport:
    """Let the parts of a graph around its peak run in tiles, in place. Nothing may trace the graph afterwards.

    gm: a forward or backward graph after the partition; products may have been arranged, fused ops not yet been bufferized
    tiles: into how many tiles rows are cut, at the sizes given (those of the compiled call); or
    limit_bytes: as many as make the peak at most this, if any do. More rows at run time are more tiles, not larger ones.
    sizes: numbers for symbolic sizes
    """
    if (tiles is None) == (limit_bytes is None):
        raise ValueError("tile takes a number of tiles or a limit in bytes, one of them")
    memory = Memory(gm.graph, sizes)
    chosen, count = (choose_parts(memory, tiles), tiles) if tiles else _within(memory, limit_bytes or 0)
    return _cut(gm, memory, chosen, count)


def tile_freely(gm: fx.GraphModule, sizes: Sizes | None = None) -> TileReport | None:
    """``tile``, where it costs next to no time and saves a tenth of what lives at most; None, and nothing done, elsewhere.

    Only on a CUDA device, with enough rows in a tile that matmuls still fill it.
    """
    memory = Memory(gm.graph, sizes)
    rates, units = device_of(memory)
    best: tuple[int, list[Segment], int] | None = None
    for count in FREE_COUNTS if units else ():
        chosen = choose_parts(memory, count)
        if not chosen or min(segment.tokens(memory.sizes) for segment in chosen) < count * FREE_ROWS:
            break
        extra = sum(extra_ms(memory, segment, _largest(memory, segment, count), rates, units) for segment in chosen)
        peak, least = memory.peak(chosen, _fraction(memory, chosen, count)).bytes, best[0] if best else memory.untiled.bytes * FREE_GAIN
        if extra <= FREE_TIME * graph_ms(memory, rates) and peak < least:
            best = (peak, chosen, count)
    return _cut(gm, memory, best[1], best[2]) if best else None


def _cut(gm: fx.GraphModule, memory: Memory, chosen: list[Segment], count: int) -> TileReport:
    """Put calls in the places of parts."""
    report = TileReport(memory.untiled.bytes, memory.peak(chosen, _fraction(memory, chosen, count)).bytes)
    bodies = [Body(segment, memory) for segment in chosen]
    _reorder(gm.graph, memory.steps(chosen))
    for segment, body in zip(chosen, bodies, strict=True):
        total, largest = segment.tokens(memory.sizes), _largest(memory, segment, count)
        report.segments.append((len(segment.nodes), largest, -(-total // largest)))
        report.sources.append(fx.GraphModule({}, body.copied()[0]).code)
    loops = [body.loop(part[1], count) for body, part in zip(bodies, report.segments, strict=True)]
    moved: dict[fx.Node, fx.Node] = {}
    for i, (segment, body, loop) in enumerate(zip(chosen, bodies, loops, strict=True)):
        insert(segment, body, loop, f"tiles_{i}", moved)
    if chosen:
        gm.graph.lint()
        gm.recompile()
    return report


def _reorder(graph: fx.Graph, steps: list[list[fx.Node]]) -> None:
    """Let the nodes of a graph stand in another order."""
    previous = graph._root
    for step in steps:
        for node in step:
            previous.append(node)
            previous = node


class Tiled(NamedTuple):
    """A graph in so many tiles: the peak, and what it takes longer in milliseconds."""

    tiles: int
    peak: Peak
    extra_ms: float


def priced(graph: fx.Graph, counts: Sequence[int], sizes: Sizes | None = None, device: tuple[Rates, int] | None = None) -> list[Tiled]:
    """What each number of tiles (1: none) would come to; the graph stays. device: see ``device_of``."""
    memory = Memory(graph, sizes)
    device = device or device_of(memory)
    found = []
    for count in counts:
        chosen = choose_parts(memory, count)
        rows = [_largest(memory, segment, count, device) for segment in chosen]
        extra = sum(extra_ms(memory, segment, size, *device) for segment, size in zip(chosen, rows, strict=True))
        found.append(Tiled(count, memory.peak(chosen, _fraction(memory, chosen, count, device)), extra))
    return found


def tiled_peak(graph: fx.Graph, tiles: int, sizes: Sizes | None = None) -> Peak:
    """The most that would live with so many tiles."""
    return peak_in(Memory(graph, sizes), tiles)


def peak_in(memory: Memory, tiles: int, accounts: Accounts | None = None, moving: Moving = STILL) -> Peak:
    """The same of a graph that was looked at: parts that were found for one number of tiles serve for others. accounts, moving: what
    is counted (not what parts are chosen by, as the graph that runs is cut without them)."""
    chosen = choose_parts(memory, tiles)
    return memory.peak(chosen, _fraction(memory, chosen, tiles), accounts, moving)


def _within(memory: Memory, limit: int) -> tuple[list[Segment], int]:
    """The fewest tiles with which the peak keeps a limit, or those with the lowest peak."""
    best: tuple[int, list[Segment], int] = (memory.untiled.bytes, [], 1)
    for count in _COUNTS:
        if best[0] <= limit:
            break
        chosen = choose_parts(memory, count)
        if chosen and min(segment.tokens(memory.sizes) for segment in chosen) < count * STEP:
            break
        peak = memory.peak(chosen, _fraction(memory, chosen, count)).bytes
        if peak < best[0]:
            best = (peak, chosen, count)
    return best[1], best[2]


def _fraction(memory: Memory, chosen: list[Segment], count: int, device: tuple[Rates, int] | None = None) -> float:
    """What part of the rows a tile has."""
    totals = [(segment.tokens(memory.sizes), _largest(memory, segment, count, device)) for segment in chosen]
    return max((min(1.0, largest / total) for total, largest in totals), default=1.0)


def _largest(memory: Memory, segment: Segment, count: int, device: tuple[Rates, int] | None = None) -> int:
    """Rows of a tile: a multiple of STEP, unless there are hardly any; of several that which matmuls like."""
    even = -(-segment.tokens(memory.sizes) // count)
    return even if even < STEP else best_rows(memory, segment, -(-even // STEP) * STEP, *(device or device_of(memory)))


def device_of(memory: Memory) -> tuple[Rates, int]:
    """Rates and number of multiprocessors (0 on a CPU) of the device that a graph runs on."""
    device = next((node.meta["val"].device for node in memory.root), torch.device("cpu"))
    return (rates_of(device), units_of(device)) if device.type == "cuda" and torch.cuda.is_available() else (USUAL, 0)
