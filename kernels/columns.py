"""Sums over rows, in two stages and a fixed order: the same bits on every run, no atomics.

Stage one is part of the row kernel: each of P persistent program instances adds the rows it walks into float32 registers (one
partial sum per column) and writes them to a buffer [P, columns of all summed outputs]. Stage two, ``finish``, adds the P partial sums.
"""

from __future__ import annotations

from collections.abc import Sequence

from fxfuse.emit import Scope, Writer, rounded
from fxfuse.kernels.source import columns_text, summed_outputs
from fxfuse.program import Lane, Output, Program


def sums_at(w: Writer, depth: int) -> list[int]:
    """The values to be summed over rows in the walk after ``depth`` reductions: the last one, where registers are fewest."""
    return [value for _, _, value, _ in _sums(w)] if depth == last_walk(w) else []


def last_walk(w: Writer) -> int:
    """The reductions that the last walk along a row waits for."""
    return max(w.flow.depth[value] for output in w.program.outputs for value, _ in output.stores)


def declare(w: Writer, block: str = "") -> None:
    """Accumulators in registers: one for each stored lane of each summed output. ``block``: suffix of those of one block."""
    for output, k, _, lane in _sums(w):
        width = "1" if lane is None else f"B_{lane.axis}"
        w.line(f"sum_{output.name}_{k}{block} = tl.zeros(({'1' if w.schedule.single else 'ROWS'}, {width}), {w.math})")


def let_next_kernel_start(w: Writer) -> None:
    """The second stage is set up while the first runs, and waits for it there."""
    w.line("device.let_next_kernel_start(EARLY)")


def accumulate(w: Writer, scope: Scope, block: str = "", depth: int | None = None, early: bool | None = None) -> None:
    """Adds the tile; rows that do not exist add nothing. The rows of a tile are added up at the end only.

    ``depth``: of a walk along the row; the last one adds. ``early``: only what waits for no reduction, or only what does."""
    for output, k, value, _ in _sums(w) if depth in (None, last_walk(w)) else []:
        if early is not None and early != (w.flow.depth[value] == 0):
            continue
        text = w.operand(value, scope)
        text = f"tl.where(row_ok, {text}, 0.0)" if w.row_mask else text
        w.line(f"sum_{output.name}_{k}{block} += {text}")


def store_partials(w: Writer, scopes: Sequence[Scope], part: str, blocks: Sequence[str] = ("",)) -> None:
    """Writes this instance's row of the buffer of partial sums. ``blocks``: suffixes of the sums of each scope."""
    w.line(f"p_part = p_partials + {part}.to(tl.int64) * ({total_columns(w.program)})")
    starts = _starts(w.program)
    for scope, block in zip(scopes, blocks, strict=True):
        for output, k, _, lane in _sums(w):
            column = "unit" if lane is None else _column(lane, scope)
            mask = None if lane is None else scope.mask[lane.axis]
            w.line(f"tl.store(p_part + ({starts[output.name]}) + {column}, "
                   f"tl.sum(sum_{output.name}_{k}{block}, 0, keep_dims=True){f', mask={mask}' if mask else ''})")


def finish(program: Program) -> list[str]:
    """The second kernel: each program instance adds up B columns of the partial sums, whichever outputs they belong to.

    P rows are loaded at once; as a rule that is all of them, so that an instance waits for memory once.
    """
    outputs, starts = summed_outputs(program), _starts(program)
    pointers = [f"p_{output.name}" for output in outputs]
    widths = [f"W_{axis}" for axis, _ in program.axes]
    constants = ["P: tl.constexpr", "B: tl.constexpr", "EARLY: tl.constexpr"]
    lines = ['@triton.jit(do_not_specialize=["n_parts"])',
             f"def finish({', '.join(['p_partials', *pointers, 'n_parts', *widths, *constants])}):",
             "    device.wait_for_earlier_kernel(EARLY)",
             f"    n_columns = {total_columns(program)}",
             "    parts = tl.arange(0, P)[:, None]",
             "    columns = tl.program_id(0) * B + tl.arange(0, B)[None, :]",
             f"    total = tl.zeros((P, B), tl.{program.math})",
             "    for first in range(0, n_parts, P):",
             "        p_part = p_partials + (first + parts).to(tl.int64) * n_columns + columns",
             "        total += tl.load(p_part, mask=(first + parts < n_parts) & (columns < n_columns), other=0.0)",
             "    total = tl.sum(total, 0, keep_dims=True)"]
    for output in outputs:
        lines += [
            f"    column = columns - ({starts[output.name]})",
            f"    tl.store(p_{output.name} + column, {rounded('total', output.dtype, program.math)}, "
            f"mask=(column >= 0) & (column < {columns_text(program, output)}))",
        ]
    return lines


def total_columns(program: Program) -> str:
    return " + ".join(columns_text(program, output) for output in summed_outputs(program))


def _starts(program: Program) -> dict[str, str]:
    """Where each summed output begins in a row of partial sums."""
    starts, before = {}, ["0"]
    for output in summed_outputs(program):
        starts[output.name] = " + ".join(before)
        before.append(columns_text(program, output))
    return starts


def _sums(w: Writer) -> list[tuple[Output, int, int, Lane | None]]:
    return [(output, k, value, lane) for output in summed_outputs(w.program) for k, (value, lane) in enumerate(output.stores)]


def _column(lane: Lane, scope: Scope) -> str:
    text = scope.index[lane.axis]
    text = f"{lane.stride} * {text}" if lane.stride != 1 else text
    return f"{lane.offset} + {text}" if lane.offset else text
