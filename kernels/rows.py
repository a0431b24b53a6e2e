"""Schedule "rows": a program instance holds ROWS whole rows in registers, every axis side by side.

Each tensor is read once and written once; reductions stay in registers. For rows up to a register tile: norms, rotary heads, softmax.

Where tensors with columns are shared by the rows of the last leading dimension (rotary tables, by the heads of a position), a
tile holds such rows only, and loads what they share once.

Outputs that are summed over rows (the gradient of a norm's weight) make it persistent: a fixed number of program instances walk the
rows in a fixed order, keep one partial sum per column in registers, and write it at the end (see columns.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from fxfuse.emit import Scope, Writer
from fxfuse.kernels import columns
from fxfuse.kernels.source import summed_outputs
from fxfuse.program import Output


def write(w: Writer, tile: str = "tl.program_id(0)") -> None:
    """The body of the kernel. ``tile``: which tile of rows an instance works on."""
    axes = [axis for axis, _ in w.program.axes]
    w.line("unit = tl.zeros((1, 1), tl.int32)")
    w.together()
    if not summed_outputs(w.program):
        w.rows(tile)
        write_tile(w, w.scope(axes))
        return
    columns.let_next_kernel_start(w)
    scope = w.scope(axes)
    w.values([v for v in w.flow.live if not w.program.extents[v].row and not w.is_reloaded(v)], scope)
    columns.declare(w)
    w.line(f"for tile in tl.range(tl.program_id(0), {w.tiles}, tl.num_programs(0), num_stages=STAGES):")
    w.indent += 1
    w.rows("tile")
    write_tile(w, scope)
    w.indent -= 1
    columns.store_partials(w, scope, "tl.program_id(0)")


def write_tile(w: Writer, scope: Scope) -> None:
    """Every value of a tile, the outputs that have rows, and what the tile adds to sums over rows."""
    early = stores_early(w)
    first = write_early(w, scope) if early else []
    write_reductions(w, scope)
    w.values(w.flow.live, scope)
    if w.flow.gathers:
        w.line("tl.debug_barrier()")  # a row may be overwritten in place: nobody has yet to read a single element of it
    write_stores(w, scope, [output for output in w.program.outputs if not output.sums_rows and output not in first])
    columns.accumulate(w, scope, early=False if early else None)


def stores_early(w: Writer) -> bool:
    """Not where something is read again later: an output may lie in its place."""
    return w.schedule.early and not w.schedule.reload and not w.flow.gathers


def write_stores(w: Writer, scope: Scope, outputs: Iterable[Output]) -> None:
    for output in outputs:
        for axis in dict.fromkeys(None if lane is None else lane.axis for _, lane in output.stores):
            w.store(output, scope, axis)


def write_early(w: Writer, scope: Scope) -> list[Output]:
    """Outputs and sums over rows that wait for no reduction along the row. Every tensor is loaded before: an output may lie in its
    place."""
    w.values([v for v in w.flow.live if w.program.nodes[v].op == "load"], scope)
    outputs = [output for output in w.program.outputs if not output.sums_rows and all(w.flow.depth[v] == 0 for v, _ in output.stores)]
    summed = [v for output in summed_outputs(w.program) for v, _ in output.stores if w.flow.depth[v] == 0]
    w.values({part for v in (*summed, *(v for output in outputs for v, _ in output.stores)) for part in w.flow.below(v)}, scope)
    columns.accumulate(w, scope, early=True)
    write_stores(w, scope, outputs)
    return outputs


def write_reductions(w: Writer, scope: Scope) -> None:
    """Sums that can be known at the same time, together; all reductions, if later values are not to be kept meanwhile."""
    without_columns = [v for v in w.flow.live if w.program.extents[v].axis is None]
    if w.schedule.reload:
        reduced = [w.program.nodes[v].operands[0] for v in without_columns if w.flow.is_reduction(v)]
        parts = frozenset(part for v in reduced for part in w.flow.column_part(v)[0])
        scope = replace(scope, suffix="_first", again=parts, written=set())
    if not w.schedule.nested:
        for sums in w.flow.sums_together:
            w.values({part for v in sums for part in w.flow.below(w.program.nodes[v].operands[0])}, scope)
            texts = ", ".join(w.masked(w.program.nodes[v].operands[0], scope, "0.0") for v in sums)
            w.line(f"{', '.join(f'v{v}' for v in sums)} = device.sums_of_{len(sums)}({texts})")
            w.known.update(sums)
    if w.schedule.reload:
        w.values({*parts, *without_columns}, scope)
