"""Which rows and columns a tile has: their indices, masks and pointers."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

from ..dataflow import Dataflow
from ..program import Argument, Lane, Output, Program
from .schedule import Schedule, Scope, tensors_of


class Addresses:
    """Writes one kernel: lines of Triton at an indentation, and the names of the values written so far."""

    def __init__(self, program: Program, schedule: Schedule) -> None:
        self.program = program
        self.schedule = schedule
        self.flow = Dataflow(program)
        self.math = f"tl.{program.math}"
        self.lines: list[str] = []
        self.indent = 1
        self.known: set[int] = set()  # values without columns that are already written
        self.access = {t.name: access for t, access in zip(tensors_of(program), schedule.accesses, strict=True)}

    def line(self, text: str) -> None:
        self.lines.append("    " * self.indent + text)

    # Rows

    def rows(self, tile: str) -> None:
        """The row index of a tile, its mask, and every tensor's row pointers."""
        schedule = self.schedule
        if schedule.nested:
            self._nested_rows(tile)
        elif schedule.rank:
            tile = f"{tile}.to(tl.int64)" if schedule.wide else tile
            self.line(f"rows = {tile}" if schedule.single else f"rows = {tile} * ROWS + tl.arange(0, ROWS)[:, None]")
            if not schedule.single:
                self.line("row_ok = rows < n_rows")
            rest = "rows"
            for d in range(schedule.rank - 1, 0, -1):
                self.line(f"i{d} = {rest} % n_{d}")
                self.line(f"{'i0' if d == 1 else 'outer'} = {rest} // n_{d}")
                rest = "outer"
        for tensor in tensors_of(self.program):
            dims = [d for d, varies in enumerate(self.access[tensor.name].dims) if varies]
            if dims and not self._is_summed(tensor):
                offset = " + ".join(f"{'rows' if schedule.rank == 1 else f'i{d}'} * s_{tensor.name}_{d}" for d in dims)
                self.line(f"p_{tensor.name}_row = p_{tensor.name} + {offset}")

    def together(self) -> None:
        """Row offsets, all 0, that make a load of what rows share as high as the threads reach at once."""
        for axis, rows in self.schedule.together:
            self.line(f"{axis}_together = tl.zeros(({rows}, 1), tl.int32)")

    def _nested_rows(self, tile: str) -> None:
        """Outer indices as scalars, one each a tile; the inner one [R, 1], with its mask."""
        last = self.schedule.rank - 1
        self.line(f"tile_index = {tile}{'.to(tl.int64)' if self.schedule.wide else ''}")
        self.line(f"n_inner_tiles = tl.cdiv(n_{last}, ROWS)")
        self.line(f"i{last} = tile_index % n_inner_tiles * ROWS + tl.arange(0, ROWS)[:, None]")
        if not self.schedule.whole:
            self.line(f"row_ok = i{last} < n_{last}")
        rest = "tile_index // n_inner_tiles"
        for d in range(last - 1, 0, -1):
            self.line(f"outer = {rest}")
            self.line(f"i{d} = outer % n_{d}")
            rest = f"outer // n_{d}"
        self.line(f"i0 = {rest}")

    @property
    def tiles(self) -> str:
        """The number of tiles of rows."""
        last = self.schedule.rank - 1
        return f"n_rows // n_{last} * tl.cdiv(n_{last}, ROWS)" if self.schedule.nested else "tl.cdiv(n_rows, ROWS)"

    def _is_summed(self, tensor: Argument | Output) -> bool:
        return isinstance(tensor, Output) and tensor.sums_rows

    def _varies(self, name: str) -> bool:
        return any(self.access[name].dims)

    def _is_tall(self, name: str) -> bool:
        """Whether a tensor varies over the rows of a tile."""
        dims = self.access[name].dims
        return dims[-1] if self.schedule.nested else any(dims)

    @property
    def row_mask(self) -> str | None:
        return None if self.schedule.single or self.schedule.whole or not self.schedule.rank else "row_ok"

    # Columns

    def columns(self, axis: str, start: str = "", masked: bool = True, suffix: str = "") -> tuple[str, str | None]:
        """Writes the column index of a block of an axis, and its mask; returns their names."""
        index, mask = f"{axis}{suffix}", f"{axis}_ok{suffix}"
        self.line(f"{index} = {start + ' + ' if start else ''}tl.arange(0, B_{axis})[None, :]")
        if not masked:
            return index, None
        self.line(f"{mask} = {index} < W_{axis}")
        return index, mask

    def pair_columns(self, axis: str, start: str = "", masked: bool = True, suffix: str = "") -> tuple[str, str | None]:
        """The same for the 2 B interleaved columns that the block of an axis and its twin lie in."""
        index, mask = f"{axis}_pair{suffix}", f"{axis}_pair_ok{suffix}"
        self.line(f"{index} = {f'2 * ({start}) + ' if start else ''}tl.arange(0, 2 * B_{axis})[None, :]")
        if not masked:
            return index, None
        self.line(f"{mask} = {index} < 2 * W_{axis}")
        return index, mask

    def scope(self, axes: Iterable[str], start: str = "", masked: bool = True, suffix: str = "") -> Scope:
        """Writes the column indices of some axes."""
        scope = Scope({}, {}, suffix)
        for axis in axes:
            mask = masked and axis not in self.schedule.exact
            scope.index[axis], scope.mask[axis] = self.columns(axis, start, mask, suffix)
            if axis in self.paired_axes:
                scope.pairs[axis] = self.pair_columns(axis, start, mask, suffix)
        return scope

    def block(self, axis: str, k: int, suffix: str) -> Scope:
        """Block ``k`` of a row whose blocks are written out; the last one alone may reach past the end."""
        return self.scope([axis], f"{k} * B_{axis}" if k else "", masked=k == self.schedule.blocks - 1, suffix=suffix)

    # Interleaved lanes: columns 2i and 2i+1 are loaded together and split in registers

    @cached_property
    def paired_axes(self) -> set[str]:
        names = [t.name for t in tensors_of(self.program)]
        return {lane.axis for name in names for lane in self._lanes(name) if self._twin(name, lane) is not None}

    def _lanes(self, name: str) -> list[Lane]:
        loads = [n.attributes[1] for n in self.program.nodes if n.op == "load" and n.attributes[0] == name]
        stores = [lane for output in self.program.outputs if output.name == name for _, lane in output.stores]
        return [lane for lane in (*loads, *stores) if lane is not None]

    def _twin(self, name: str, lane: Lane | None) -> Lane | None:
        """The lane that interleaves with this one, if the tensor's columns lie densely."""
        if lane is None or lane.stride != 2 or self.access[name].strided:
            return None
        lanes = set(self._lanes(name))
        return next((twin for step in (1, -1) if (twin := lane._replace(offset=lane.offset + step)) in lanes), None)
