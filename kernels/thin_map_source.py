"""The text of a map beside thin products (thin_map.py): a row program on tiles of matrices, and products of what it reads and gives.

An instance walks down a block of columns, tile after tile. It adds to what it loads the low-rank terms of the operands, computes the
program, stores what is wanted of the results, and multiplies them, as they are rounded, by thin matrices: into parts of ``across``, one
a block of columns, and into sums of ``down`` that stay in registers until its rows end. A second kernel adds up the parts in one order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from fxfuse.emit import Access, Schedule, Scope, Writer, tensors_of
from fxfuse.kernels.source import wrapped
from fxfuse.program import Output, Program

LEAST_RANK = 16  # of a tensor core's product

HEADER = '''"""A map beside thin products. Written by fxfuse for {beside}, and the row program

{program}
"""
import triton
import triton.language as tl

from fxfuse.kernels import device
from fxfuse.kernels.thin_pair_kernel import added_up, product, settled
'''


class Thin(NamedTuple):
    """A thin product of ``rank`` beside a tensor of the program, by its name: an argument that it is added to, or an output that it
    is made of; times ``factor``."""

    name: str
    rank: int
    factor: float

    @property
    def ranks(self) -> int:
        """Columns of the tile of a thin matrix."""
        return max(LEAST_RANK, 1 << max(self.rank - 1, 0).bit_length())


class Beside(NamedTuple):
    """What there is beside the values of a program, whose tensors are all matrices [M, N] of one 16-bit dtype.

    added:  argument += factor * left [M, R] @ right [R, N], rounded to the argument's dtype
    stored: outputs that are wanted themselves
    across: [M, R] = factor * output @ right [N, R]
    down:   [N, R] = factor * output' @ left [M, R]
    """

    added: tuple[Thin, ...]
    stored: tuple[str, ...]
    across: tuple[Thin, ...]
    down: tuple[Thin, ...]


def source(program: Program, beside: Beside, spans: int, exact: bool, wide: bool, pairs: bool) -> str:
    """The file of both kernels. spans: of B columns each that an instance takes, one after the other in every tile, so that there are
    fewer parts of ``across``; exact: columns need no mask; wide, pairs: see ``emit.Schedule``."""
    accesses = tuple(Access((True,)) for _ in tensors_of(program))
    (axis, _), = program.axes
    schedule = Schedule("tiled", 1, accesses, single=False, exact=(axis,) if exact else (), wide=wide, hints="loads", pairs=pairs)
    writer = _Tile(program, schedule, beside, spans)
    writer.write()
    header = HEADER.format(beside=f"{len(beside.added)} terms added and {len(beside.across)} + {len(beside.down)} products",
                           program="\n".join(f"    {line}" for line in str(program).splitlines()))
    lines = [header, "", '@triton.jit(do_not_specialize=["n_rows", "tiles_each"])', "def parts(", *wrapped(parameters(program, beside)),
             "):", *writer.lines]  # fmt: skip
    if beside.across or beside.down:
        lines += ["", "", *_sums(beside)]
    return "\n".join([*lines, ""])


def parameters(program: Program, beside: Beside) -> list[str]:
    """Of the first kernel: pointers in the order of ``thin_map.Operands``, strides, sizes, constants."""
    (axis, width), = program.axes
    pointers = [f"p_{name}" for name in _matrices(program, beside)]
    strides = [f"s_{name}_0" for name in _matrices(program, beside)]
    for k in range(len(beside.added)):
        pointers += [f"p_added_left_{k}", f"p_added_right_{k}"]
        strides += [f"s_added_left_{k}", f"s_added_right_{k}", f"s_added_right_{k}_c"]
    for k in range(len(beside.across)):
        pointers += [f"p_across_right_{k}", f"p_across_parts_{k}"]
        strides += [f"s_across_right_{k}", f"s_across_right_{k}_c"]
    for k in range(len(beside.down)):
        pointers += [f"p_down_left_{k}", f"p_down_parts_{k}"]
        strides += [f"s_down_left_{k}"]
    return [*pointers, *strides, "n_rows", "tiles_each", f"W_{axis}" + ("" if width is None else ": tl.constexpr"),
            "ROWS: tl.constexpr", f"B_{axis}: tl.constexpr", "STAGES: tl.constexpr", "EARLY: tl.constexpr"]  # fmt: skip


def _matrices(program: Program, beside: Beside) -> Iterator[str]:
    """Names of the matrices that are read and stored."""
    yield from (argument.name for argument in program.arguments)
    yield from beside.stored


class _Tile(Writer):
    """Writes the first kernel."""

    def __init__(self, program: Program, schedule: Schedule, beside: Beside, spans: int) -> None:
        super().__init__(program, schedule)
        self.beside, self.spans = beside, spans
        (self.axis, _), = program.axes

    def write(self) -> None:
        axis = self.axis
        self.line(f"blocks = tl.cdiv(W_{axis}, {self.spans} * B_{axis})")
        self.line("block, split = tl.program_id(0) % blocks, tl.program_id(0) // blocks")
        for ranks in sorted({thin.ranks for thin in self._thin()}):
            self.line(f"rank_{ranks} = tl.arange(0, {ranks})")
        scopes = [self._span(span) for span in range(self.spans)]
        self.line("first = split * tiles_each")
        self.line("last = tl.minimum(first + tiles_each, tl.cdiv(n_rows, ROWS))")
        self.line("for tile in tl.range(first, last, num_stages=STAGES):")
        self.indent += 1
        self._tile(scopes)
        self.indent -= 1
        self.line("device.let_next_kernel_start(EARLY)")
        for scope in scopes:
            for k, thin in enumerate(self.beside.down):
                self.line(f"tl.store(p_down_parts_{k} + (split * W_{axis} + column{scope.suffix}).to(tl.int64)[:, None] * {thin.rank} "
                          f"+ rank_{thin.ranks}[None, :], down_{k}{scope.suffix}, mask={self._of_columns(thin, scope)})")  # fmt: skip

    def _span(self, span: int) -> Scope:
        """The columns of one span of the block, the thin matrices that all of its rows share, and the sums over them."""
        axis, x = self.axis, f"_{span}"
        self.line(f"column{x} = (block * {self.spans} + {span}) * B_{axis} + tl.arange(0, B_{axis})")
        self.line(f"in_columns{x} = column{x} < W_{axis}")
        self.line(f"{axis}{x} = column{x}[None, :]")
        scope = Scope({axis: axis + x}, {axis: None if axis in self.schedule.exact else f"{axis}_ok{x}"}, x)
        if scope.mask[axis]:
            self.line(f"{axis}_ok{x} = in_columns{x}[None, :]")
        for k, thin in enumerate(self.beside.added):
            self.line(f"added_right_{k}{x} = tl.load(p_added_right_{k} + rank_{thin.ranks}[:, None] * s_added_right_{k} "
                      f"+ column{x}[None, :] * s_added_right_{k}_c, mask=(rank_{thin.ranks} < {thin.rank})[:, None] "
                      f"& in_columns{x}[None, :], other=0.0)")  # fmt: skip
        for k, thin in enumerate(self.beside.across):
            self.line(f"across_right_{k}{x} = tl.load(p_across_right_{k} + column{x}[:, None] * s_across_right_{k} "
                      f"+ rank_{thin.ranks}[None, :] * s_across_right_{k}_c, mask={self._of_columns(thin, scope)}, "
                      "other=0.0)")  # fmt: skip
        for k, thin in enumerate(self.beside.down):
            self.line(f"down_{k}{x} = tl.zeros((B_{axis}, {thin.ranks}), tl.float32)")
        return scope

    def load(self, value: int, scope: Scope) -> None:
        """A load, and the low-rank terms of what was loaded."""
        super().load(value, scope)
        name = self.program.nodes[value].attributes[0]
        loaded = self.name(value, scope)
        if self.beside.added and self.beside.down and all(thin.name != name for thin in self.beside.added):
            # Nothing is added, but the sum lies in the registers of a tensor core's result, as those with terms do, and as the products
            # of the results want them. Else each element would be computed twice, here and where a store wants it.
            dtype = self.program.argument(name).dtype
            left, right = (f"tl.zeros(({shape}), tl.{dtype})" for shape in (f"ROWS, {LEAST_RANK}", f"{LEAST_RANK}, B_{self.axis}"))
            self.line(f"{loaded} = product({left}, {right}, {loaded})")
        for k, thin in enumerate(self.beside.added):
            if thin.name == name:
                factor = "" if thin.factor == 1.0 else f" * {thin.factor!r}"
                none, dtype = f"tl.zeros((ROWS, B_{self.axis}), tl.float32)", self.program.argument(name).dtype
                self.line(f"term = product(added_left_{k}, added_right_{k}{scope.suffix}, {none}){factor}")
                self.line(f"{loaded} = settled({loaded} + term, tl.{dtype}, {self.schedule.pairs}).to(tl.float32)")

    def _thin(self) -> Iterator[Thin]:
        yield from (*self.beside.added, *self.beside.across, *self.beside.down)

    def _of_columns(self, thin: Thin, scope: Scope) -> str:
        return f"in_columns{scope.suffix}[:, None] & (rank_{thin.ranks} < {thin.rank})[None, :]"

    def _of_rows(self, thin: Thin) -> str:
        return f"row_ok & (rank_{thin.ranks} < {thin.rank})[None, :]"

    def _tile(self, scopes: list[Scope]) -> None:
        self.line(f"rows = (tile * ROWS + tl.arange(0, ROWS)){'.to(tl.int64)' if self.schedule.wide else ''}[:, None]")
        self.line("row_ok = rows < n_rows")
        for name in _matrices(self.program, self.beside):
            self.line(f"p_{name}_row = p_{name} + rows * s_{name}_0")
        for which, group in (("added", self.beside.added), ("down", self.beside.down)):
            for k, thin in enumerate(group):
                self.line(f"{which}_left_{k} = tl.load(p_{which}_left_{k} + rows * s_{which}_left_{k} + rank_{thin.ranks}[None, :], "
                          f"mask={self._of_rows(thin)}, other=0.0)")
        for k, thin in enumerate(self.beside.across):
            self.line(f"made_{k} = tl.zeros((ROWS, {thin.ranks}), tl.float32)")
        for scope in scopes:
            scope.written.clear()
            for output in self.program.outputs:
                (value, _), = output.stores
                self.values(self.flow.below(value), scope)  # what only later results need is not in registers yet
                self._output(output, scope)
        for k, thin in enumerate(self.beside.across):
            self.line(f"tl.store(p_across_parts_{k} + (block * n_rows + rows).to(tl.int64) * {thin.rank} + rank_{thin.ranks}[None, :], "
                      f"made_{k}, mask={self._of_rows(thin)})")

    def _output(self, output: Output, scope: Scope) -> None:
        """A result in the dtype it is stored in: stored, and multiplied."""
        (value, lane), = output.stores
        result = f"o_{output.name}{scope.suffix}"
        self.line(f"{result} = settled({self.operand(value, scope)}, tl.{output.dtype}, {self.schedule.pairs})")
        if output.name in self.beside.stored:
            self.line(f"tl.store({self.pointer(output.name, lane, scope)}, {result}{self.mask(output.name, lane, scope)})")
        for k, thin in enumerate(self.beside.across):
            if thin.name == output.name:
                self.line(f"made_{k} = product({result}, across_right_{k}{scope.suffix}, made_{k})")
        for k, thin in enumerate(self.beside.down):
            if thin.name == output.name:
                self.line(f"down_{k}{scope.suffix} = product(tl.trans({result}), down_left_{k}, down_{k}{scope.suffix})")


def _sums(beside: Beside) -> list[str]:
    """The second kernel: instances share out the numbers of all results, one result after the other."""
    thin = [*beside.across, *beside.down]
    pointers = [name for k in range(len(thin)) for name in (f"p_parts_{k}", f"p_{k}")]
    numbers = [name for k in range(len(thin)) for name in (f"numbers_{k}", f"count_{k}", f"stride_{k}", f"step_{k}")]
    names = ", ".join(f'"{name}"' for name in numbers if not name.startswith("st"))
    lines = [f"@triton.jit(do_not_specialize=[{names}])", "def sums(",
             *wrapped([*pointers, *numbers, "PARTS: tl.constexpr", "SUMMED: tl.constexpr", "EARLY: tl.constexpr"]), "):",
             "    device.wait_for_earlier_kernel(EARLY)", "    instance = tl.program_id(0)", "    begin = 0"]  # fmt: skip
    for k, one in enumerate(thin):
        given = f"p_parts_{k}, p_{k}, numbers_{k}, count_{k}, stride_{k}, step_{k}, {one.factor!r}, instance - begin, {one.rank}"
        lines += [f"    end = begin + tl.cdiv(numbers_{k}, SUMMED)", "    if (instance >= begin) & (instance < end):",
                  f"        added_up({given}, PARTS, SUMMED)",
                  "    begin = end"]  # fmt: skip
    return lines
