"""Schedule "looped": a program instance walks one row in blocks of B columns, for rows longer than a register tile.

A reduction that waits for no other is known after one walk (its *depth* is 0), one that needs its result after two, and so on; a
value is stored in the first walk in which it is known. A sum of exponentials shifted by a maximum is known together with it: what has
been added up is scaled down whenever the maximum rises. So the forward of cross-entropy reads the logits once (the label's logit is
one gathered element), softmax reads its input twice.

The maximum so far is kept apart for every group of GROUP neighbouring columns of a block, which one thread holds: no thread waits for
another before the end of the row.
"""

from __future__ import annotations

from fxfuse.emit import Scope, Writer
from fxfuse.program import Node, Output

GROUP = 8
Walk = tuple[list[int], list[Output]]


def write(w: Writer) -> None:
    """The body of the kernel."""
    w.line("unit = tl.zeros((1, 1), tl.int32)")
    w.rows("tl.program_id(0)")
    without_columns = [v for v in w.flow.live if w.program.extents[v].axis is None and not w.flow.is_reduction(v)]
    for depth in range(max(w.flow.depth[v] for v in w.flow.live) + 1):
        w.values([v for v in without_columns if w.flow.depth[v] == depth], Scope({}, {}))
        for axis, _ in w.program.axes:
            write_walk(w, depth, axis)
    for output in w.program.outputs:
        w.store(output, Scope({}, {}), None)


def write_walk(w: Writer, depth: int, axis: str) -> None:
    """One walk along an axis: the reductions and the stores that need ``depth`` reductions before them."""
    nodes = w.program.nodes
    walk, *later = [_walk(w, d, axis) for d in range(depth, max(w.flow.depth) + 1)]
    reductions, stores = walk
    if not reductions and not stores:
        return
    for v in reductions:
        _declare(w, v, nodes[v], axis)
    name = f"{axis}{depth}"
    w.line(f"for start in tl.range(0, W_{axis} // B_{axis} * B_{axis}, B_{axis}, num_stages=STAGES):")
    w.indent += 1
    _write_block(w, walk, later, axis, w.scope([axis], "start", masked=False, suffix=f"_{name}"))
    w.indent -= 1
    if axis not in w.schedule.exact:
        w.line(f"tail = W_{axis} // B_{axis} * B_{axis}")
        _write_block(w, walk, later, axis, w.scope([axis], "tail", suffix=f"_{name}_tail"))
    for v in reductions:
        w.line(f"v{v} = {_finish(w, v, nodes[v])}")
        w.known.add(v)


def _walk(w: Writer, depth: int, axis: str) -> Walk:
    """The reductions and the outputs of one walk."""
    reductions = [v for v in w.flow.live if w.flow.is_reduction(v) and w.program.nodes[v].attributes == (axis,)
                  and w.flow.depth[v] == depth + 1]
    return reductions, [output for output in w.program.outputs if _store_depth(w, output, axis) == depth]


def _store_depth(w: Writer, output: Output, axis: str) -> int | None:
    depths = [w.flow.depth[v] for v, lane in output.stores if lane is not None and lane.axis == axis]
    return max(depths, default=None)


def _write_block(w: Writer, walk: Walk, later: list[Walk], axis: str, scope: Scope) -> None:
    """What happens to one block: its values, its part of each reduction, its stores."""
    reductions, stores = walk
    scope.again = frozenset(_needed(w, later, axis))
    peaks = [v for v in reductions if v in w.flow.online.values()]
    for v in peaks:
        w.values(w.flow.column_part(w.program.nodes[v].operands[0])[0], scope)
        text = w.masked(w.program.nodes[v].operands[0], scope, 'float("-inf")')
        w.line(f"peak{v}, shift{v}, less{v} = device.online_peak(peak{v}, {text})")
        scope.running[v] = f"shift{v}"
    w.values(_needed(w, [walk], axis), scope)
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
