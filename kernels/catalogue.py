"""The catalogue: which schedule a program is poured into, and the source that comes out."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fxfuse import reference
from fxfuse.dataflow import Dataflow
from fxfuse.emit import Access, Schedule, Writer, tensors_of
from fxfuse.kernels import columns, looped, rows, tiled
from fxfuse.kernels.abilities import NONE, Abilities
from fxfuse.kernels.layout import Layout, is_wide, shares_columns
from fxfuse.kernels.source import document, summed_outputs
from fxfuse.program import Output, Program

if TYPE_CHECKING:
    from fxfuse.kernels.configuration import Config

WRITERS = {"rows": rows.write, "tiled": tiled.write, "looped": looped.write}

# Columns (of all axes together) that fit the registers of a program instance, by how many tensors with rows and columns it reads:
# 1024 threads have 64 registers each.
REGISTER_COLUMNS = {1: 32768, 2: 16384, 3: 16384}
MANY_TENSORS_COLUMNS = 8192
# Of rows that are also summed over, a program instance holds this many columns whole; or so many of the row and of all sums together,
# in segments or if it loads the row again. Walked in blocks, it holds the sums alone: this many columns of all of them.
COLUMNS_BESIDE_SUMS, COLUMNS_AND_SUMS, COLUMNS_OF_SUMS = 8192, 43008, 32768
# Columns of a segment: 16 bytes of 16-bit numbers a thread for 2 warps.
NARROWEST_SEGMENT = 512
# Pointwise rows up to this width are taken whole, several to a tile; wider ones are cut into blocks.
NARROW = 1024
# Inner dimensions up to this size are heads, of which a model has a fixed number; longer ones are lengths, which change.
MOST_HEADS = 256


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@lru_cache(maxsize=4096)
def segment_of(width: int) -> int:
    """Columns of a segment, a power of 2, if a row had better be held in 3 to 7 of them than in one block; else 0.

    12288 columns are 3 segments of 4096, 5120 are 5 of 1024; what is within an eighth of a power of 2 is one block."""
    whole = next_power_of_2(width)
    cuts = [(-(-width // block) * block, -block) for block in (whole // 4, whole // 8) if block >= NARROWEST_SEGMENT]
    held, block = min(cuts, default=(whole, 0))
    return -block if 8 * held <= 7 * whole else 0


def is_cut(program: Program) -> bool:
    """Whether rows may be held in segments: they have one axis, of a width that the program fixes. Each length that is cut is a kernel
    of its own, and of lengths that change (keys of an attention) there are many."""
    return len(program.axes) == 1 and program.axes[0][1] is not None


def columns_of_row(program: Program, width: int) -> int:
    """Columns in which an axis can be held at best: in segments, or in a block."""
    block = segment_of(width) if is_cut(program) else 0
    return -(-width // block) * block if block else next_power_of_2(width)


@lru_cache(maxsize=4096)
def wide_lanes(program: Program) -> tuple[tuple[str, str], ...]:
    """(tensor, axis) of every lane, read or stored, of tensors that have both rows and columns."""
    flow = Dataflow(program)
    loads = [program.nodes[v].attributes for v in flow.live if program.nodes[v].op == "load"]
    read = [(name, lane.axis) for name, lane in loads if lane is not None and any(program.argument(name).rows)]
    stored = [(o.name, lane.axis) for o in program.outputs for _, lane in o.stores if lane is not None and any(o.rows)]
    return (*read, *stored)


@lru_cache(maxsize=4096)
def shared_lanes(program: Program) -> tuple[tuple[str, str], ...]:
    """(argument, axis) of every lane read of arguments with columns that all rows share (the weight of a norm)."""
    loads = [program.nodes[v].attributes for v in Dataflow(program).live if program.nodes[v].op == "load"]
    return tuple((name, lane.axis) for name, lane in loads if lane is not None and not any(program.argument(name).rows))


@lru_cache(maxsize=4096)
def wide_loads(program: Program) -> int:
    """Loads of tensors that have both rows and columns: what a program instance holds in registers for each column."""
    arguments = {argument.name for argument in program.arguments}
    return sum(1 for name, _ in wide_lanes(program) if name in arguments)


def choose_kind(program: Program, widths: dict[str, int]) -> str | None:
    """"rows", "tiled" or "looped"; None for a program that must be split: very long rows, reduced along both directions."""
    reduces, sums = has_reductions(program), bool(summed_outputs(program))
    per_row = sum(columns_of_row(program, width) for width in widths.values())
    in_sums = sum(columns_of_row(program, widths[lane.axis]) for o in summed_outputs(program) for _, lane in o.stores if lane)
    fits = per_row <= REGISTER_COLUMNS.get(max(wide_loads(program), 1), MANY_TENSORS_COLUMNS)
    if sums and reduces:
        fits = fits and (per_row <= COLUMNS_BESIDE_SUMS or per_row + in_sums <= COLUMNS_AND_SUMS)
    if not reduces and len(widths) == 1 and (per_row > NARROW or not fits):
        return "tiled"
    if fits or (sums and not reduces):
        return "rows"
    return "looped" if not sums or (len(widths) == 1 and in_sums <= COLUMNS_OF_SUMS) else None


@lru_cache(maxsize=4096)
def has_reductions(program: Program) -> bool:
    """Whether some value is summed or maximised along the columns."""
    return Dataflow(program).has_reductions


def schedule_for(program: Program, layout: Layout, kind: str, config: Config, blocks: dict[str, int],
                 able: Abilities = NONE) -> Schedule:
    """The schedule of a launch in a configuration, with ``blocks[axis]`` columns to a tile, on a device."""
    tile_rows = config.rows
    exact = tuple(axis for axis, width in layout.widths if width % blocks[axis] == 0)
    nested = kind == "rows" and tile_rows > 1 and shares_columns(program, layout)
    whole = nested and layout.sizes[-1] % tile_rows == 0 and layout.sizes[-1] <= MOST_HEADS
    together = _together(program, tile_rows, blocks, config.warps) if nested else ()
    return Schedule(kind, len(layout.sizes), layout.accesses, tile_rows == 1, exact, is_wide(program, layout), nested, whole, together,
                    config.reload, config.hints, _written_out(program, layout, kind, blocks),
                    able.pairs and _rounds_in_pairs(program, tile_rows, blocks, config.warps), config.early)


def _written_out(program: Program, layout: Layout, kind: str, blocks: dict[str, int]) -> int:
    """The number of blocks of a row, where each keeps sums over rows, or the row is held in several; 0: a loop walks them, or it is
    one."""
    if kind == "tiled" or (kind == "looped" and not summed_outputs(program)) or len(layout.widths) > 1:
        return 0
    (axis, width), = layout.widths
    count = -(-width // blocks[axis])
    return count if kind == "looped" or count > 1 else 0


def _together(program: Program, tile_rows: int, blocks: dict[str, int], warps: int) -> tuple[tuple[str, int], ...]:
    """By axis: the rows that the threads of an instance load at once, 16 bytes each."""
    widest = max(reference.torch_dtype(t.dtype).itemsize for t in tensors_of(program) if t.columns is not None)
    elements = 32 * warps * max(1, 16 // widest)
    return tuple((axis, min(tile_rows, max(1, elements // block))) for axis, block in blocks.items())


def _rounds_in_pairs(program: Program, tile_rows: int, blocks: dict[str, int], warps: int) -> bool:
    """Whether each thread has two numbers at least of every value that is rounded to bfloat16: of small tiles it has one."""
    interleaved = any(node.op == "load" and node.attributes[1] is not None and node.attributes[1].stride != 1 for node in program.nodes)
    for v, node in enumerate(program.nodes):
        extent = program.extents[v]
        if node.op == "cast" and node.attributes[0] == "bfloat16" and extent.axis is not None:
            height = tile_rows if extent.row and not interleaved else 1
            if height * blocks[extent.axis] < 2 * 32 * warps:
                return False
    return True


def tiles_of(schedule: Schedule, layout: Layout, tile_rows: int) -> int:
    """How many tiles of rows a launch has."""
    inner = layout.sizes[-1] if schedule.nested else layout.rows
    return layout.rows // inner * -(-inner // tile_rows)


def contiguous_schedule(program: Program, kind: str = "rows", **changes: Any) -> Schedule:
    """A schedule for printing and compiling without tensors: every tensor dense, leading dimensions coalesced to one."""
    accesses = tuple(Access((all(t.rows) if isinstance(t, Output) else any(t.rows),)) for t in tensors_of(program))
    return replace(Schedule(kind, 1, accesses, single=True, exact=(), wide=False), **changes)


@lru_cache(maxsize=4096)
def emit(program: Program, schedule: Schedule, title: str = "A row program") -> str:
    """The Triton source of a program under a schedule: a Python file."""
    writer = Writer(program, schedule)
    WRITERS[schedule.kind](writer)
    finish = columns.finish(program) if summed_outputs(program) else []
    return document(program, schedule, title, writer.lines, finish)
