"""Schedule "looped": a program instance walks one row in blocks of B columns, for rows longer than a register tile.

A reduction that waits for no other is known after one walk (its *depth* is 0), one that needs its result after two, and so on; a
value is stored in the first walk in which it is known. A sum of exponentials shifted by a maximum is known together with it: what has
been added up is scaled down whenever the maximum rises. So the forward of cross-entropy reads the logits once (the label's logit is
one gathered element), softmax reads its input twice.

The maximum so far is kept apart for every group of GROUP neighbouring columns of a block, which one thread holds: no thread waits for
another before the end of the row.

Outputs that are summed over rows make it persistent, as in rows.py: one partial sum per column stays in registers, so the blocks of a
row are written out one after the other, each with its own. What a later walk reads again comes from the cache.
"""

from __future__ import annotations

from fxfuse.emit import Scope, Writer
from fxfuse.kernels import columns
from fxfuse.kernels.source import summed_outputs
from fxfuse.program import Node, Output

GROUP = 8
Walk = tuple[list[int], list[Output]]


def write(w: Writer) -> None:
    """The body of the kernel."""
    w.line("unit = tl.zeros((1, 1), tl.int32)")
    if not summed_outputs(w.program):
        w.rows("tl.program_id(0)")
        write_row(w)
        return
    (axis, _), = w.program.axes
    columns.let_next_kernel_start(w)
    for k in range(w.schedule.blocks):
        columns.declare(w, f"_{k}")
    w.line(f"for tile in tl.range(tl.program_id(0), {w.tiles}, tl.num_programs(0)):")
    w.indent += 1
    w.rows("tile")
    write_row(w)
    w.indent -= 1
    blocks = range(w.schedule.blocks)
    columns.store_partials(w, [w.block(axis, k, f"_sums_{k}") for k in blocks], "tl.program_id(0)", [f"_{k}" for k in blocks])


def write_row(w: Writer) -> None:
    """Every walk along one row, and the outputs that have rows."""
    without_columns = [v for v in w.flow.live if w.program.extents[v].axis is None and not w.flow.is_reduction(v)]
    for depth in range(max(w.flow.depth[v] for v in w.flow.live) + 1):
        w.values([v for v in without_columns if w.flow.depth[v] == depth], Scope({}, {}))
        for axis, _ in w.program.axes:
            write_walk(w, depth, axis)
    for output in w.program.outputs:
        if not output.sums_rows:
            w.store(output, Scope({}, {}), None)


def write_walk(w: Writer, depth: int, axis: str) -> None:
    """One walk along an axis: the reductions and the stores that need ``depth`` reductions before them."""
    nodes = w.program.nodes
    walk, *later = [_walk(w, d, axis) for d in range(depth, max(w.flow.depth) + 1)]
    reductions, stores = walk
    if not reductions and not stores and not columns.sums_at(w, depth):
        return
    together = next((sums for sums in w.flow.sums_together if sums[0] in reductions), [])
    for v in reductions:
        _declare(w, v, nodes[v], axis)
    name = f"{axis}{depth}"
    if stores and w.flow.gathers:
        w.line("tl.debug_barrier()")  # a row may be overwritten in place: nobody has yet to read a single element of it
    if w.schedule.blocks:
        for k in range(w.schedule.blocks):
            scope = w.block(axis, k, f"_{name}_{k}")
            _write_block(w, walk, later, axis, scope, columns.sums_at(w, depth))
            columns.accumulate(w, scope, f"_{k}", depth)
    else:
        _write_loop(w, walk, later, axis, name)
    for v in reductions:
        if v in together:
            w.line(f"{', '.join(f'v{u}' for u in together)} = "
                   f"device.sums_of_{len(together)}({', '.join(f'total{u}' for u in together)})")
            w.known.update(together)
            together = []
        elif v not in w.known:
            w.line(f"v{v} = {_finish(w, v, nodes[v])}")
            w.known.add(v)


def _write_loop(w: Writer, walk: Walk, later: list[Walk], axis: str, name: str) -> None:
    """A loop over the blocks of a row, and what remains of it."""
    w.line(f"for start in tl.range(0, W_{axis} // B_{axis} * B_{axis}, B_{axis}, num_stages=STAGES):")
    w.indent += 1
    _write_block(w, walk, later, axis, w.scope([axis], "start", masked=False, suffix=f"_{name}"))
    w.indent -= 1
    if axis not in w.schedule.exact:
        w.line(f"tail = W_{axis} // B_{axis} * B_{axis}")
        _write_block(w, walk, later, axis, w.scope([axis], "tail", suffix=f"_{name}_tail"))


def _walk(w: Writer, depth: int, axis: str) -> Walk:
    """The reductions and the outputs of one walk."""
    reductions = [v for v in w.flow.live if w.flow.is_reduction(v) and w.program.nodes[v].attributes == (axis,)
                  and w.flow.depth[v] == depth + 1]
    stores = [o for o in w.program.outputs if not o.sums_rows and _store_depth(w, o, axis) == depth]
    return reductions, stores


def _store_depth(w: Writer, output: Output, axis: str) -> int | None:
    depths = [w.flow.depth[v] for v, lane in output.stores if lane is not None and lane.axis == axis]
    return max(depths, default=None)


def _write_block(w: Writer, walk: Walk, later: list[Walk], axis: str, scope: Scope,
                 summed: list[int] | None = None) -> None:
    """What happens to one block: its values, its part of each reduction, its stores."""
    reductions, stores = walk
    scope.again = frozenset(_needed(w, later, axis))
    if summed is not None and reductions:
        scope.again = frozenset(w.flow.live)
    peaks = [v for v in reductions if v in w.flow.online.values()]
    for v in peaks:
        w.values(w.flow.column_part(w.program.nodes[v].operands[0])[0], scope)
        text = w.masked(w.program.nodes[v].operands[0], scope, 'float("-inf")')
        w.line(f"peak{v}, shift{v}, less{v} = device.online_peak(peak{v}, {text})")
        scope.running[v] = f"shift{v}"
    w.values(_needed(w, [walk], axis) | {v for root in summed or () for v in w.flow.column_part(root)[0]}, scope)
    for v in reductions:
        if v not in peaks:
            _accumulate(w, v, w.program.nodes[v], scope)
    for output in stores:
        w.store(output, scope, axis)


def _needed(w: Writer, walks: list[Walk], axis: str) -> set[int]:
    """The values with columns that some walks compute."""
    roots = [w.program.nodes[v].operands[0] for reductions, _ in walks for v in reductions]
    roots += [v for _, stores in walks for output in stores for v, lane in output.stores if lane is not None and lane.axis == axis]
    return {v for root in roots for v in w.flow.column_part(root)[0]}


def _declare(w: Writer, v: int, node: Node, axis: str) -> None:
    if v in w.flow.online.values():
        w.line(f'peak{v} = tl.full(((B_{axis} + {GROUP - 1}) // {GROUP}, 1), float("-inf"), {w.math})')
        return
    if node.op == "logsumexp":
        w.line(f'peak{v} = tl.full((1, 1), float("-inf"), {w.math})')
    start = 'float("-inf")' if node.op == "max" else "0.0"
    w.line(f"total{v} = tl.full((1, B_{axis}), {start}, {w.math})")


def _accumulate(w: Writer, v: int, node: Node, scope: Scope) -> None:
    text = w.masked(node.operands[0], scope, "0.0" if node.op == "sum" else 'float("-inf")')
    if v in w.flow.online:
        w.line(f"total{v} = total{v} * less{w.flow.online[v]} + {text}")
    elif node.op == "sum":
        w.line(f"total{v} += {text}")
    elif node.op == "max":
        w.line(f"total{v} = device.maximum(total{v}, {text})")
    else:
        w.line(f"peak{v}, total{v} = device.online_logsumexp(peak{v}, total{v}, {text})")


def _finish(w: Writer, v: int, node: Node) -> str:
    if v in w.flow.online.values():
        return f"device.row_max(tl.reshape(peak{v}, (1, peak{v}.shape[0])))"
    if v in w.flow.online:
        peak = w.flow.online[v]
        return f"device.finish_online(total{v}, peak{peak}, v{peak})"
    if node.op == "sum":
        return f"tl.sum(total{v}, 1, keep_dims=True)"
    return f"device.row_max(total{v})" if node.op == "max" else f"device.finish_logsumexp(peak{v}, total{v})"
