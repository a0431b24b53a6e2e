"""Schedule "rows": a program instance holds ROWS whole rows in registers, every axis side by side.

Each tensor is read once and written once; reductions stay in registers. For rows up to a register tile: norms, rotary heads, softmax.

Where tensors with columns are shared by the rows of the last leading dimension (rotary tables, by the heads of a position), a
tile holds such rows only, and loads what they share once.

Outputs that are summed over rows (the gradient of a norm's weight) make it persistent: a fixed number of program instances walk the
rows in a fixed order, keep one partial sum per column in registers, and write it at the end (see columns.py).
"""

from __future__ import annotations

from fxfuse.emit import Scope, Writer
from fxfuse.kernels import columns
from fxfuse.kernels.source import summed_outputs


def write(w: Writer, tile: str = "tl.program_id(0)") -> None:
    """The body of the kernel. ``tile``: which tile of rows an instance works on."""
    axes = [axis for axis, _ in w.program.axes]
    w.line("unit = tl.zeros((1, 1), tl.int32)")
    w.together()
    if not summed_outputs(w.program):
        w.rows(tile)
        write_tile(w, w.scope(axes))
        return
    scope = w.scope(axes)
    w.values([v for v in w.flow.live if not w.program.extents[v].row], scope)
    columns.declare(w)
    w.line(f"for tile in tl.range(tl.program_id(0), {w.tiles}, tl.num_programs(0), num_stages=STAGES):")
    w.indent += 1
    w.rows("tile")
    write_tile(w, scope)
    columns.accumulate(w, scope)
    w.indent -= 1
    columns.store_partials(w, scope, "tl.program_id(0)")


def write_tile(w: Writer, scope: Scope) -> None:
    """Every value of a tile, and the outputs that have rows."""
    w.values(w.flow.live, scope)
    for output in w.program.outputs:
        if not output.sums_rows:
            for axis in dict.fromkeys(None if lane is None else lane.axis for _, lane in output.stores):
                w.store(output, scope, axis)
