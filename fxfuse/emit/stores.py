"""Stores: the lanes of an output, two interleaved ones at once."""

from __future__ import annotations

from ..program import Lane, Output
from .schedule import Scope
from .values import Values


class Writer(Values):
    """Writes the stores of a program, and with that everything a skeleton needs."""

    def store(self, output: Output, scope: Scope, axis: str | None) -> None:
        """Stores the lanes of an output that lie on one axis (None: an output without columns)."""
        done: set[Lane | None] = set()
        for value, lane in output.stores:
            if (None if lane is None else lane.axis) != axis or lane in done:
                continue
            twin = self._twin(output.name, lane)
            if lane is not None and twin is not None:
                self._store_pair(output, lane, twin, scope)
                done.add(twin)
            else:
                text = self.rounded(value, output.dtype, scope)
                pointer, mask = self.pointer(output.name, lane, scope), self.mask(output.name, lane, scope)
                passing = ', cache_modifier=".cs"' if self.schedule.hints == "all" and lane is not None else ""
                self.line(f"tl.store({pointer}, {text}{mask}{passing})")

    def _store_pair(self, output: Output, lane: Lane, twin: Lane, scope: Scope) -> None:
        values = {stored: value for value, stored in output.stores}
        pointer, mask, height = self._pair_access(output.name, min(lane, twin), scope)
        shape = f"({height}, B_{lane.axis})"
        pair = ", ".join(f"tl.broadcast_to({self.rounded(values[x], output.dtype, scope)}, {shape})"
                         for x in sorted((lane, twin)))
        self.line(f"{output.name}_pair = tl.reshape(tl.join({pair}), ({height}, 2 * B_{lane.axis}))")
        self.line(f"tl.store({pointer}, {output.name}_pair{mask})")
