"""What tiles cost: matmuls over fewer rows fill the device less evenly, small operations take a launch's time, weights are made again.

A matmul is cut into blocks of its result, which the units of a device compute in turns; the last turn may be mostly idle. Over some
numbers of rows that hardly costs anything, over others, somewhat larger ones, a tenth.
"""

from __future__ import annotations

from math import ceil
from typing import Any

from torch import fx

from ...linear_loss.chunks import TILE
from ...products import calls
from ..costs import PRODUCTS, Rates, milliseconds
from .live import PLACEABLE, Memory, aten
from .loop import STEP
from .rows import SUMMED
from .segment import Segment

# Positions of the two factors.
_FACTORS: dict[Any, tuple[int, int]] = {
    aten.mm.default: (0, 1), calls.product: (0, 1), calls.mixed_product: (0, 1), aten.addmm.default: (1, 2), calls.accumulate: (1, 2),
    calls.columns: (1, 2), calls.thin_pair: (3, 4),
}  # fmt: skip


def node_ms(node: fx.Node, memory: Memory, rates: Rates) -> float:
    """What one run of an operation takes."""
    if node.target in PRODUCTS or node.target not in _FACTORS:
        return milliseconds(node, memory.sizes, rates)
    left, right = (node.args[i].meta["val"] for i in _FACTORS[node.target])  # type: ignore[union-attr]
    arithmetic = 2 * memory.sizes.elements(left) * memory.sizes.number(right.shape[1])
    return max(arithmetic / (rates.product if left.itemsize < 4 else rates.product_32) * 1e3, rates.launch_ms)


def graph_ms(memory: Memory, rates: Rates) -> float:
    return sum(node_ms(node, memory, rates) for node in memory.order.nodes)


def extra_ms(memory: Memory, segment: Segment, rows: int, rates: Rates, units: int) -> float:
    """What running a part in tiles of so many rows takes more. units: multiprocessors of the device, 0: fill does not matter."""
    total = segment.tokens(memory.sizes)
    count = ceil(total / rows)
    extra = 0.0
    for node in segment.inside:
        whole = node_ms(node, memory, rates)
        extra += count * sum(node_ms(source, memory, rates) for source in segment.made_for(node))
        if whole:
            extra += max(whole * idle(memory, segment, node, rows, units), count * rates.launch_ms) - whole
    extra -= sum(node_ms(node, memory, rates) for node in segment.repeated)
    over = memory.places(segment)
    for node in segment.results:
        moved = 2 * memory.bytes(node) / rates.copy * 1e3
        if segment.rows[node] == SUMMED:
            extra += (count - 1) * 2 * moved
        elif memory.root[node].target not in PLACEABLE and node not in over:
            extra += moved
    return extra


def idle(memory: Memory, segment: Segment, node: fx.Node, rows: int, units: int) -> float:
    """By what factor an operation takes longer over tiles, the result of each cut into blocks for the units of the device."""
    if node.target not in _FACTORS or segment.rows.get(node) != (0,) or not units:
        return 1.0
    columns = memory.sizes.number(node.args[_FACTORS[node.target][1]].meta["val"].shape[1])  # type: ignore[union-attr]
    if columns < TILE[1]:
        return 1.0
    total = segment.tokens(memory.sizes)
    full, rest = divmod(total, rows)
    return (full * _turns(rows, columns, units) + _turns(rest, columns, units)) / _turns(total, columns, units)


def _turns(rows: int, columns: int, units: int) -> int:
    return ceil(ceil(rows / TILE[0]) * ceil(columns / TILE[1]) / units)


def best_rows(memory: Memory, segment: Segment, most: int, rates: Rates, units: int) -> int:
    """Rows of a tile, at most ``most`` and not much less: those with which matmuls fill the device best."""
    if most < 2 * STEP or not units:
        return most
    candidates = range(most, ceil(0.7 * most), -STEP)
    return min(candidates, key=lambda rows: extra_ms(memory, segment, rows, rates, units), default=most)
