"""Schedule "tiled": a map over blocks of columns of some rows; nothing is reduced along the columns.

For pointwise programs wider than a register tile: gates, activations, the backward of cross-entropy. Where every tensor lies densely
the launch makes one long row of them all, and this is a one-dimensional map.

Outputs summed over rows (the gradient of a bias) make it persistent along the rows, as in rows.py.
"""

from __future__ import annotations

from fxfuse.emit import Writer
from fxfuse.kernels import columns
from fxfuse.kernels.rows import write_tile
from fxfuse.kernels.source import summed_outputs


def write(w: Writer) -> None:
    """The body of the kernel. Program instances go through the blocks of a row first, then to the next rows."""
    (axis, _), = w.program.axes
    w.line("unit = tl.zeros((1, 1), tl.int32)")
    w.line(f"n_blocks = tl.cdiv(W_{axis}, B_{axis})")
    block = "tl.program_id(0) % n_blocks" if w.schedule.rank else "tl.program_id(0)"
    w.line(f"start = ({block}){'.to(tl.int64)' if w.schedule.wide else ''} * B_{axis}")
    scope = w.scope([axis], "start")
    if not summed_outputs(w.program):
        w.rows("(tl.program_id(0) // n_blocks)")
        write_tile(w, [scope])
        return
    columns.let_next_kernel_start(w)
    w.values([v for v in w.flow.live if not w.program.extents[v].row], scope)
    columns.declare(w)
    w.line("group, n_groups = tl.program_id(0) // n_blocks, tl.num_programs(0) // n_blocks")
    w.line("for tile in tl.range(group, tl.cdiv(n_rows, ROWS), n_groups, num_stages=STAGES):")
    w.indent += 1
    w.rows("tile")
    write_tile(w, [scope])
    w.indent -= 1
    columns.store_partials(w, [scope], "group")
