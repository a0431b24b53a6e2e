"""Schedule "rows": a program instance holds ROWS whole rows in registers, every axis side by side.

Each tensor is read once and written once; reductions stay in registers. For rows up to a register tile: norms, rotary heads, softmax.

A row may be held in segments, blocks of equal width side by side: 12288 columns as three blocks of 4096, where one block, whose width
is a power of two, would be a quarter empty. Each value then stands once for every segment; what is reduced along the row is combined
column by column first.

Where tensors with columns are shared by the rows of the last leading dimension (rotary tables, by the heads of a position), a
tile holds such rows only, and loads what they share once.

Outputs that are summed over rows (the gradient of a norm's weight) make it persistent: a fixed number of program instances walk the
rows in a fixed order, keep one partial sum per column in registers, and write it at the end (see columns.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from fxfuse.emit import Scope, Writer
from fxfuse.kernels import columns
from fxfuse.kernels.source import summed_outputs
from fxfuse.program import Output


def write(w: Writer, tile: str = "tl.program_id(0)") -> None:
    """The body of the kernel. ``tile``: which tile of rows an instance works on."""
    w.line("unit = tl.zeros((1, 1), tl.int32)")
    w.together()
    if not summed_outputs(w.program):
        w.rows(tile)
        write_tile(w, segments(w))
        return
    columns.let_next_kernel_start(w)
    scopes = segments(w)
    write_shared(w, scopes)
    for scope in scopes:
        columns.declare(w, scope.suffix)
    w.line(f"for tile in tl.range(tl.program_id(0), {w.tiles}, tl.num_programs(0), num_stages=STAGES):")
    w.indent += 1
    w.rows("tile")
    write_tile(w, scopes)
    w.indent -= 1
    columns.store_partials(w, scopes, "tl.program_id(0)", [scope.suffix for scope in scopes])


def segments(w: Writer) -> list[Scope]:
    """Where the columns of a tile are: in one block of each axis, or in blocks of its only axis, one beside the other."""
    if not w.schedule.blocks:
        return [w.scope([axis for axis, _ in w.program.axes])]
    (axis, _), = w.program.axes
    return [w.block(axis, k, f"_{k}") for k in range(w.schedule.blocks)]


def write_shared(w: Writer, scopes: Sequence[Scope]) -> None:
    """What all rows share, once; where its columns are loaded with each tile, only what is made of them that has none."""
    shared = [v for v in w.flow.live if not w.program.extents[v].row]
    kept = [v for v in shared if not w.is_reloaded(v)]
    if kept != shared:
        reduced = [w.program.nodes[v].operands[0] for v in kept if w.flow.is_reduction(v)]
        kept += [part for v in reduced for part in w.flow.column_part(v)[0]]
        scopes = [replace(scope, suffix=f"_shared{scope.suffix}", written=set()) for scope in scopes]
    w.values(kept, *scopes)


def write_tile(w: Writer, scopes: Sequence[Scope]) -> None:
    """Every value of a tile, the outputs that have rows, and what the tile adds to sums over rows."""
    early = stores_early(w)
    first = write_early(w, scopes) if early else []
    write_reductions(w, scopes)
    w.values(w.flow.live, *scopes)
    if w.flow.gathers:
        w.line("tl.debug_barrier()")  # a row may be overwritten in place: nobody has yet to read a single element of it
    write_stores(w, scopes, [output for output in w.program.outputs if not output.sums_rows and output not in first])
    for scope in scopes:
        columns.accumulate(w, scope, scope.suffix, early=False if early else None)


def stores_early(w: Writer) -> bool:
    """Not where something is read again later: an output may lie in its place."""
    return w.schedule.early and not w.schedule.reload and not w.flow.gathers


def write_stores(w: Writer, scopes: Sequence[Scope], outputs: Iterable[Output]) -> None:
    for output in outputs:
        for axis in dict.fromkeys(None if lane is None else lane.axis for _, lane in output.stores):
            for scope in scopes if axis is not None else scopes[:1]:
                w.store(output, scope, axis)


def write_early(w: Writer, scopes: Sequence[Scope]) -> list[Output]:
    """Outputs and sums over rows that wait for no reduction along the row. Every tensor of rows is loaded before: an output may lie in
    its place."""
    w.values([v for v in w.flow.live if w.program.nodes[v].op == "load" and w.program.extents[v].row], *scopes)
    outputs = [output for output in w.program.outputs if not output.sums_rows and all(w.flow.depth[v] == 0 for v, _ in output.stores)]
    summed = [v for output in summed_outputs(w.program) for v, _ in output.stores if w.flow.depth[v] == 0]
    w.values({part for v in (*summed, *(v for output in outputs for v, _ in output.stores)) for part in w.flow.below(v)}, *scopes)
    for scope in scopes:
        columns.accumulate(w, scope, scope.suffix, early=True)
    write_stores(w, scopes, outputs)
    return outputs


def write_reductions(w: Writer, scopes: Sequence[Scope]) -> None:
    """Sums that can be known at the same time, together; all reductions, if later values are not to be kept meanwhile."""
    without_columns = [v for v in w.flow.live if w.program.extents[v].axis is None]
    if w.schedule.reload:
        reduced = [w.program.nodes[v].operands[0] for v in without_columns if w.flow.is_reduction(v)]
        parts = frozenset(part for v in reduced for part in w.flow.column_part(v)[0])
        scopes = [replace(scope, suffix=f"_first{scope.suffix}", again=parts, written=set()) for scope in scopes]
    if not w.schedule.nested:
        for sums in w.flow.sums_together:
            w.values({part for v in sums for part in w.flow.below(w.program.nodes[v].operands[0])}, *scopes)
            texts = ", ".join(w.summed(w.program.nodes[v].operands[0], *scopes) for v in sums)
            w.line(f"{', '.join(f'v{v}' for v in sums)} = device.sums_of_{len(sums)}({texts})")
            w.known.update(sums)
    if w.schedule.reload:
        w.values({*parts, *without_columns}, *scopes)
