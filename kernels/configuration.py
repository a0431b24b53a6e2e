"""The numbers of a launch: how many rows and columns to a tile, warps, pipeline stages, persistent instances.

``default`` is a rule of thumb for memory-bound kernels: 16-byte accesses, 16 to 32 elements a thread, some 20 warps a multiprocessor.
``candidates`` are its few neighbours worth timing on the device (see tuning.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fxfuse.kernels.catalogue import next_power_of_2, wide_lanes, wide_loads
from fxfuse.kernels.layout import Layout
from fxfuse.kernels.source import summed_outputs
from fxfuse.program import Program


@dataclass(frozen=True)
class Config:
    """rows: of a tile. block: columns of a tile ("tiled", "looped"; 0 for "rows", which takes whole rows). warps: of an instance.
    stages: loads in flight in a loop. per_unit: persistent instances on each multiprocessor."""

    rows: int
    block: int
    warps: int
    stages: int = 1
    per_unit: int = 1


def _warps(elements: int, per_thread: int, most: int = 32) -> int:
    return max(1, min(most, next_power_of_2(elements // (32 * per_thread))))


def columns_held(program: Program, widths: dict[str, int]) -> int:
    """Columns of a row that a program instance holds of its widest tensor, a power of 2: a rotary head counts both halves."""
    lanes: dict[str, list[str]] = {}
    for load in wide_lanes(program):
        lanes.setdefault(load[0], []).append(load[1])
    most = max((sum(next_power_of_2(widths[axis]) for axis in axes) for axes in lanes.values()), default=1)
    return next_power_of_2(max(most, sum(map(next_power_of_2, widths.values())), 1))


def default(program: Program, kind: str, layout: Layout) -> Config:
    sums = bool(summed_outputs(program))
    if kind == "looped":
        return Config(1, min(4096, max(next_power_of_2(w) for _, w in layout.widths)), 8, stages=1)
    if kind == "tiled":
        if sums:
            return Config(8, 256, 4, stages=3, per_unit=8)
        return Config(1, 4096, 8) if max(w for _, w in layout.widths) >= 32768 and layout.sizes else Config(1, 1024, 4)
    columns = columns_held(program, dict(layout.widths))
    rows = max(1, min(2048 // columns, 512, next_power_of_2(layout.rows)))
    per_thread = 16 if sums or wide_loads(program) > 1 or columns <= 4096 else 32
    if sum(len(output.stores) for output in summed_outputs(program)) > 1 and columns <= 4096:
        per_thread = 8  # each sum takes a register an element
    warps = max(_warps(rows * columns, per_thread), 1 if rows * columns < 2048 else 4)
    # Persistent: two tiles are loaded ahead of the one worked on; as many instances as fit, each with a row of partial sums.
    return Config(rows, 0, warps, stages=3, per_unit=4) if sums else Config(rows, 0, warps)


def candidates(program: Program, kind: str, layout: Layout) -> list[Config]:
    """The default first; the others differ from it in one or two numbers."""
    base = default(program, kind, layout)
    if kind == "looped":
        others = [replace(base, block=2 * base.block, warps=16), replace(base, block=2 * base.block),
                  replace(base, block=4 * base.block, warps=32), replace(base, stages=3)]
    elif kind == "tiled" and summed_outputs(program):
        others = [replace(base, stages=1), replace(base, rows=16), replace(base, block=128, rows=16), replace(base, block=512)]
    elif kind == "tiled":
        others = [Config(1, 2048, 8), Config(1, 2048, 4), Config(1, 1024, 4), Config(1, 4096, 8)]
    elif summed_outputs(program):
        others = [replace(base, stages=1), replace(base, stages=4), replace(base, per_unit=1),
                  replace(base, warps=min(2 * base.warps, 32)), replace(base, warps=max(base.warps // 2, 1), per_unit=8)]
    else:
        others = [replace(base, warps=min(2 * base.warps, 32)), replace(base, warps=max(base.warps // 2, 1))]
        if base.rows > 1:
            twice = 2 * base.rows
            others += [replace(base, rows=base.rows // 2), replace(base, rows=twice), replace(base, rows=twice, warps=8)]
    return list(dict.fromkeys([base, *(c for c in others if c.block <= 65536)]))


def blocks_of(kind: str, config: Config, widths: dict[str, int]) -> dict[str, int]:
    """Columns to a tile, axis by axis."""
    whole = {axis: next_power_of_2(width) for axis, width in widths.items()}
    return whole if kind == "rows" else {axis: min(config.block, size) for axis, size in whole.items()}
