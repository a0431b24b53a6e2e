"""The numbers of a launch: how many rows and columns to a tile, warps, pipeline stages, persistent instances.

``default`` is a rule of thumb for memory-bound kernels: 16-byte accesses, 16 to 32 elements a thread, some 20 warps a multiprocessor.
``candidates`` are its few neighbours worth timing on the device (see tuning.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fxfuse import reference
from fxfuse.dataflow import Dataflow
from fxfuse.kernels.catalogue import (
    COLUMNS_BESIDE_SUMS,
    MOST_HEADS,
    has_reductions,
    is_cut,
    next_power_of_2,
    segment_of,
    shared_lanes,
    wide_lanes,
    wide_loads,
)
from fxfuse.kernels.layout import Layout, shares_columns
from fxfuse.kernels.source import summed_outputs
from fxfuse.program import Program

# Bytes an instance may have on an H100 or H200, where no device is at hand to ask; and what reductions take of them.
SHARED_MEMORY = 232448
SCRATCH = 4096


@dataclass(frozen=True)
class Config:
    """rows: of a tile. block: columns of a tile ("tiled", "looped"), or of a segment of the row ("rows"; 0: the row is one). warps: of
    an instance. stages: loads in flight in a loop. per_unit: persistent instances on each multiprocessor. reload, hints, early: see
    Schedule. resident: instances on a multiprocessor that each leaves registers for (0: it takes as many as it likes)."""

    rows: int
    block: int
    warps: int
    stages: int = 1
    per_unit: int = 1
    reload: bool = False
    hints: str = ""
    early: bool = False
    resident: int = 0

    @property
    def most_registers(self) -> int:
        """Of a thread, of the 65536 of an NVIDIA multiprocessor, which are given out in eights; 0: any number."""
        return 65536 // (self.resident * 32 * self.warps) // 8 * 8 if self.resident else 0


def _warps(elements: int, per_thread: int, most: int = 32) -> int:
    return max(1, min(most, next_power_of_2(elements // (32 * per_thread))))


def columns_held(program: Program, widths: dict[str, int]) -> int:
    """Columns of a row that a program instance holds of its widest tensor, a power of 2: a rotary head counts both halves."""
    lanes: dict[str, list[str]] = {}
    for load in wide_lanes(program):
        lanes.setdefault(load[0], []).append(load[1])
    most = max((sum(next_power_of_2(widths[axis]) for axis in axes) for axes in lanes.values()), default=1)
    return next_power_of_2(max(most, sum(map(next_power_of_2, widths.values())), 1))


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program instance may have."""
    if device.type != "cuda":
        return SHARED_MEMORY
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)


def pipelined(program: Program, kind: str, layout: Layout, config: Config) -> int:
    """Bytes of shared memory in which a loop keeps the loads of the tiles to come: stages - 1 of them."""
    if config.stages < 2:
        return 0
    blocks = blocks_of(kind, config, dict(layout.widths))
    itemsize = {a.name: reference.torch_dtype(a.dtype).itemsize for a in program.arguments}
    width = {axis: -(-n // blocks[axis]) * blocks[axis] if kind == "rows" else blocks[axis] for axis, n in layout.widths}
    lanes = [(config.rows * width[axis], name) for name, axis in wide_lanes(program)]
    if config.reload or (config.early and kind == "rows" and config.block):  # what all rows share is loaded with each of them
        lanes += [(width[axis], name) for name, axis in shared_lanes(program)]
    tile = sum(elements * itemsize[name] for elements, name in lanes if name in itemsize) * (2 if config.reload else 1)
    return (config.stages - 1) * tile


def fits(program: Program, kind: str, layout: Layout, config: Config, shared: int) -> bool:
    return pipelined(program, kind, layout, config) + SCRATCH <= shared


def smaller(config: Config, resource: str) -> Config | None:
    """A configuration that takes less of a resource that was not enough ("threads", "shared memory"); None: there is none."""
    if resource == "threads":
        return replace(config, warps=config.warps // 2) if config.warps > 1 else None
    if config.stages > 1:
        return replace(config, stages=config.stages - 1)
    if config.rows > 1:
        return replace(config, rows=config.rows // 2)
    return replace(config, block=config.block // 2) if config.block > 128 else None


def default(program: Program, kind: str, layout: Layout, shared: int = SHARED_MEMORY) -> Config:
    """The rule of thumb, with as many loads in flight as ``shared`` bytes hold."""
    config: Config | None = _rule_of_thumb(program, kind, layout)
    while config is not None and config.stages > 1 and not fits(program, kind, layout, config, shared):
        config = smaller(config, "shared memory")
    assert config is not None
    return config


# Whole rows beside whose sums a thread has no room for its share of them.
LOADED_AGAIN = Config(1, 0, 16, reload=True)
# What costs a thread nothing to compute again.
CHEAP = frozenset({"load", "cast", "add", "sub", "mul", "neg", "square"})
# Columns of heads, lanes together, that a warp holds by itself. Rows of scores are nested too, and long: two warps of them spill.
HEAD_COLUMNS = 512


def _rule_of_thumb(program: Program, kind: str, layout: Layout) -> Config:
    sums = bool(summed_outputs(program))
    widest = max(width for _, width in layout.widths)
    if kind == "looped":
        if sums:
            return Config(1, min(8192 if widest % 8192 == 0 else 4096, next_power_of_2(widest)), 16)
        return Config(1, min(4096, next_power_of_2(widest)), 8)
    if kind == "tiled":
        if sums:
            return Config(8, 256, 4, stages=3, per_unit=8)
        if has_packed_rows(program) and len(wide_lanes(program)) > 3:
            return _whole_row(layout)
        return Config(1, 4096, 8) if widest >= 32768 and layout.sizes else Config(1, 1024, 4)
    segments = in_segments(program, layout)
    return segments[0] if segments and _beats_one_block(program, layout, segments[0]) else _one_block(program, layout)


def _one_block(program: Program, layout: Layout) -> Config:
    """Rows held as one block an axis."""
    return _rows_with_sums(program, layout) if summed_outputs(program) else _rows(program, layout)


def _rows_with_sums(program: Program, layout: Layout) -> Config:
    """Persistent: two tiles are loaded ahead of the one worked on; as many instances as fit, each with a row of partial sums."""
    columns, nested, reduces = columns_held(program, dict(layout.widths)), shares_columns(program, layout), has_reductions(program)
    if reduces and columns > COLUMNS_BESIDE_SUMS:
        return LOADED_AGAIN
    if reduces and columns > 4096 and len(wide_lanes(program)) > 4:
        return Config(1, 0, 16, stages=3, early=True)  # so many tensors, so wide: a thread has no room for its share of all
    two = wide_loads(program) == 2 and not nested
    rows = max(1, min(2048 // columns, 512, next_power_of_2(layout.rows)))
    if two and reduces and 1024 <= columns <= 2048:
        rows = min(2, next_power_of_2(layout.rows))
    if nested:
        rows = _inner_rows(layout.sizes[-1], max(1, min(2048 // columns, 512)))
    # Of several sums each takes a register an element: few threads, so that each has every register there is.
    several = sum(len(output.stores) for output in summed_outputs(program)) > 1
    warps = _warps(rows * columns, 32 if several or (two and rows * columns > 2048) else 16)
    return Config(rows, 0, max(warps, 1 if rows * columns < 2048 else 4), stages=3, per_unit=4)


def _rows(program: Program, layout: Layout) -> Config:
    columns, nested, reduces = columns_held(program, dict(layout.widths)), shares_columns(program, layout), has_reductions(program)
    if nested and reduces and columns <= HEAD_COLUMNS:
        # A warp by itself: no row waits for another warp's sum, and each thread has two elements at least of what the rows share.
        rows = _inner_rows(layout.sizes[-1], max(1, min((2048 if _tensors_read(program) == 1 else 512) // columns, 512)))
        return Config(rows, 0, _warps(rows * columns, 64))
    if reduces and not nested and wide_loads(program) == 1 and columns >= 1024:
        return _one_tensor(program, columns, layout.rows)
    rows = max(1, min(2048 // columns, 512, next_power_of_2(layout.rows)))
    if nested:
        rows = _inner_rows(layout.sizes[-1], max(1, min((4096 if reduces else 2048) // columns, 512)))
    # Nested, a thread keeps the columns that its rows share: two rows at least are to use them.
    # Of a value and its cotangent alone, each has more in flight.
    alone = reduces and not nested and wide_loads(program) == 2 and columns >= 4096 and not _shared_columns(program)
    many = (nested and rows > 1) or (wide_loads(program) == 1 and columns > 4096) or alone
    return Config(rows, 0, max(_warps(rows * columns, 32 if many else 16), 1 if rows * columns < 2048 else 2 if nested else 4))


def _tensors_read(program: Program) -> int:
    """Arguments with columns of their own in every row, whatever their lanes."""
    return len({argument.name for argument in program.arguments if all(argument.rows)} & {name for name, _ in wide_lanes(program)})


def _shared_columns(program: Program) -> bool:
    """Whether there are columns that all rows share (the weight of a norm)."""
    return any(argument.columns is not None and not any(argument.rows) for argument in program.arguments)


def _one_tensor(program: Program, columns: int, rows: int) -> Config:
    """Rows of one tensor that are reduced. Short ones are many: what was read makes room in the cache. Long ones: a thread that
    reads its share again, once a single sum is known, holds nothing meanwhile."""
    if columns <= 2048:
        return Config(min(2048 // columns, next_power_of_2(rows)), 0, 4, hints="loads")
    if columns >= 8192 and _is_one_cheap_sum(program):
        return Config(1, 0, 16, reload=True)
    flow = Dataflow(program)
    reductions = [program.nodes[v].op for v in flow.live if flow.is_reduction(v)]
    hints = "all" if columns == 4096 and reductions == ["sum", "sum"] else ""
    return Config(1, 0, _warps(columns, 16 if columns <= 4096 else 32), hints=hints)


def _is_one_cheap_sum(program: Program) -> bool:
    """Whether rows are reduced once, to a sum of what costs nothing to compute again."""
    flow = Dataflow(program)
    reductions = [program.nodes[v] for v in flow.live if flow.is_reduction(v)]
    if [node.op for node in reductions] != ["sum"]:
        return False
    return all(program.nodes[v].op in CHEAP for v in flow.column_part(reductions[0].operands[0])[0])


def has_packed_rows(program: Program) -> bool:
    """Whether a row of some tensor holds several lanes (a gate beside its values), so that a block of columns lies in several places.

    Blocks of neighbouring instances then interleave in memory, so one instance for a whole row is the default where lanes are
    written, and a candidate elsewhere.
    """
    return len(wide_lanes(program)) > len(set(wide_lanes(program)))


def _whole_row(layout: Layout) -> Config:
    block = min(16384, max(next_power_of_2(width) for _, width in layout.widths))
    return Config(1, block, _warps(block, 16))


def _inner_rows(inner: int, most: int) -> int:
    """Rows of a tile within an inner dimension: the most that divide it, or if these are few, a number that leaves few places empty
    (28 heads: 16 and 12, rather than 7 times 4; an empty place costs nothing of memory)."""
    dividing = min(inner & -inner, most)
    if dividing >= (min(8, most) if inner <= MOST_HEADS else 4):
        return dividing
    sizes = [rows for rows in (most, most // 2, most // 4) if rows >= 8 and rows <= next_power_of_2(inner) <= MOST_HEADS]
    return min(sizes, key=lambda rows: -(-inner // rows) * rows, default=min(next_power_of_2(inner), most))


def in_segments(program: Program, layout: Layout) -> list[Config]:
    """Ways to hold rows in segments, best first, if that leaves fewer columns empty than one block does, or a thread more room."""
    if not is_cut(program) or not has_reductions(program) or shares_columns(program, layout):
        return []
    (_, width), = layout.widths
    block, sums = segment_of(width), bool(summed_outputs(program))
    if not block and sums and next_power_of_2(width) > COLUMNS_BESIDE_SUMS:
        block = next_power_of_2(width) // 4
    if not block:
        return []
    columns = -(-width // block) * block
    return _segments_beside_sums(program, block, columns) if sums else _segments(program, block, columns)


def _segments_beside_sums(program: Program, block: int, columns: int) -> list[Config]:
    """At most 40 elements a thread. What waits for no reduction is summed as soon as it is loaded, and what all rows share is loaded
    with each row; two rows ahead, where that takes 16 bytes at once. Where all that is summed waits, the row is loaded again."""
    warps = min(32, max(next_power_of_2(-(-columns // (32 * 40))), min(16, block // 256)))
    units = 4 if warps < 16 else 1  # a multiprocessor has registers for one of 16 warps
    flow = Dataflow(program)
    if all(flow.depth[value] > 0 for output in summed_outputs(program) for value, _ in output.stores):
        return [Config(1, block, warps, per_unit=units, reload=True)]
    early = Config(1, block, warps, per_unit=units, early=True)
    return [replace(early, stages=3), early] if 256 * warps <= block else [early]


def _segments(program: Program, block: int, columns: int) -> list[Config]:
    """A thread holds up to 56 elements of one tensor, or of several alone; up to 40 beside columns that all rows share. Of several it
    loads 16 bytes at once. Or it reads its share again."""
    one = wide_loads(program) == 1
    most = 56 if one or not shared_lanes(program) else 40
    warps = max(4, next_power_of_2(-(-columns // (32 * most))), 0 if one else min(16, block // 256))
    held, again = Config(1, block, warps), Config(1, block, max(8, min(16, next_power_of_2(columns // 512))), reload=True)
    other = replace(held, warps=warps // 2 if columns < 32 * 32 * warps and warps > 4 else min(2 * warps, 32))
    if one and warps == 8 and columns <= 48 * 32 * warps:
        other = replace(held, resident=3)  # a few registers too many leave room for two rows only
    return [again, held, other] if one and columns > 8192 and _is_one_cheap_sum(program) else [held, other, again]


def _beats_one_block(program: Program, layout: Layout, segments: Config) -> bool:
    """Measured on an H200 from 3584 to 16384 columns: all but sums over rows for which 16 bytes at once are too many a thread."""
    columns = columns_held(program, dict(layout.widths))
    if not summed_outputs(program) or columns > COLUMNS_BESIDE_SUMS:
        return columns > 2048
    return segments.stages > 1 and segments.block >= 1024 and len(wide_lanes(program)) <= 4


def candidates(program: Program, kind: str, layout: Layout, shared: int = SHARED_MEMORY) -> list[Config]:
    """At most four, the default first; the others differ from it in one or two numbers. A program instance has at most 32 warps."""
    first, segments = default(program, kind, layout, shared), in_segments(program, layout) if kind == "rows" else []
    base = _one_block(program, layout) if segments else first
    half, twice = max(base.warps // 2, 1), min(2 * base.warps, 32)
    if kind == "looped" and summed_outputs(program):
        others = [replace(base, block=2 * base.block), replace(base, block=base.block // 2), replace(base, warps=twice)]
    elif kind == "looped":
        # 4224 rows of 128256 logits on an H200, in their place: 813, 777, 804 us; as the rule of thumb 849 (tune_probe_logits.txt).
        others = [replace(base, block=2 * base.block, warps=16), replace(base, block=2 * base.block, stages=3),
                  replace(base, block=4 * base.block, warps=32)]
    elif kind == "tiled" and summed_outputs(program):
        others = [replace(base, stages=1), replace(base, rows=16), replace(base, block=512)]
    elif kind == "tiled" and has_packed_rows(program):
        others = [_whole_row(layout), replace(_whole_row(layout), warps=16), Config(1, 1024, 4), Config(1, 2048, 8)]
    elif kind == "tiled":
        # One or two 16-byte accesses a thread of each tensor; or accesses of 4 bytes, for which many more threads are under way.
        others = [Config(1, 1024, 4), Config(1, 2048, 8), Config(1, 512, 8), Config(1, 2048, 4)]
    elif summed_outputs(program):
        columns = base.rows * columns_held(program, dict(layout.widths))
        others = [replace(base, warps=twice), replace(base, warps=half, per_unit=8)]
        if base.warps * 32 * 32 <= columns:  # a thread has its 32 elements already
            others = [replace(base, warps=twice), replace(base, rows=max(base.rows // 2, 1))]
    elif base.rows > 1 and shares_columns(program, layout):
        # More rows a thread, which share what is loaded once for all; or smaller instances of as many.
        others = [replace(base, warps=half), replace(base, rows=base.rows // 2, warps=half),
                  replace(base, rows=2 * base.rows, warps=twice)]
        if base.warps == 1:
            more = 2 if base.rows * columns_held(program, dict(layout.widths)) > 512 else 4
            others = [replace(base, rows=2 * base.rows, warps=2), replace(base, rows=base.rows // 2),
                      replace(base, rows=more * base.rows, warps=more // 2)]
    elif base.rows > 1:
        # The same elements a thread (narrower loads gain nothing), or twice as many.
        others = [replace(base, rows=2 * base.rows), replace(base, rows=base.rows // 2, warps=half),
                  replace(base, rows=2 * base.rows, warps=twice)]
    elif wide_loads(program) == 1:
        fewer = 8 if base.reload else base.warps
        # Timing is partial to what leaves its inputs in the cache, where a model's next step does not find them: where the rule of
        # thumb has them go first, so do all.
        others = [replace(base, reload=False, warps=fewer, hints="all"), replace(base, reload=False, warps=fewer, hints=""),
                  replace(base, reload=False, warps=fewer // 2)]
        if base.hints == "loads":
            others = [replace(base, warps=half), replace(base, rows=2), replace(base, rows=2, warps=half)]
    else:
        # What a thread does not keep until the sums are known comes from the cache again.
        others = [replace(base, warps=half), replace(base, warps=twice), replace(base, reload=True, hints="all")]
    others = [*segments, base] if first in segments else [*segments, *others]
    fitting = [c for c in others if c.block <= 65536 and fits(program, kind, layout, c, shared)]
    return list(dict.fromkeys([first, *fitting]))[:4]


def blocks_of(kind: str, config: Config, widths: dict[str, int]) -> dict[str, int]:
    """Columns to a tile, axis by axis."""
    whole = {axis: next_power_of_2(width) for axis, width in widths.items()}
    one = kind == "rows" and (not config.block or len(widths) > 1)
    return whole if one else {axis: min(config.block, size) for axis, size in whole.items()}
