"""Row program -> Triton: how values, tensors and rows are written. The skeletons they are poured into are in ``kernels/``.

Everything in a kernel is two-dimensional, rows x columns: a full value is a block [R, B], a row value [R, 1], a column value [1, B],
a scalar [1, 1]; so pointwise operations are plain broadcasting and reductions keep their axis. Names, as they appear in the source:

    p_x          pointer argument                 s_x_0, s_x_c     its strides (leading dimension 0, columns)
    p_x_row      pointer to the rows of the tile  b_x              what was loaded
    v7           value %7 of the program          a, a_ok          column index of axis a, and its mask
    W_a, B_a     width of axis a, block of it     rows, row_ok     row index of the tile [R, 1], and its mask
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from .dataflow import Dataflow, Gather, one_hot_index
from .errors import EmissionError
from .functions import FUNCTIONS
from .program import REDUCTIONS, Argument, Lane, Node, Output, Program

# Written as Python operators: a constant operand may stay a literal, which takes the type of the other operand.
OPERATORS = frozenset({"add", "sub", "mul", "lt", "le", "gt", "ge", "eq", "ne"})


def tensors_of(program: Program) -> tuple[Argument | Output, ...]:
    """The tensors of a launch in order: arguments, then outputs."""
    return (*program.arguments, *program.outputs)


@dataclass(frozen=True)
class Access:
    """How one tensor lies at a launch: the coalesced leading dimensions it varies over; whether its columns are strided."""

    dims: tuple[bool, ...]
    strided: bool = False


@dataclass(frozen=True)
class Schedule:
    """A skeleton and everything about a launch that changes the text of a kernel (numbers stay parameters).

    kind:     "rows" | "tiled" | "looped", a module of ``kernels/`` each
    rank:     leading dimensions left after coalescing; 0: there is one row
    accesses: of the arguments, then of the outputs
    single:   a tile holds one row, so that rows need no mask
    exact:    axes whose width is a multiple of their block, so that columns need no mask
    wide:     some offset can pass 2**31 elements: indices are int64
    nested:   the rows of a tile differ in the last leading dimension only (the heads of one position): what does not vary over it is
              loaded once for all of them
    whole:    nested tiles are always full, so that their rows need no mask
    together: nested, by axis: how many rows of a tile the threads load at once. What the rows share is loaded in that shape and then
              repeated, so that each thread has it for the columns of its own, in the same registers for all of its rows
    reload:   what reductions and later values both need is loaded for each of them (from the cache, the second time), so that no
              register holds it meanwhile
    hints:    "loads": what is read once leaves the cache first, what all rows share last; "all": stores pass it by, too
    blocks:   looped, with sums over rows: the number of blocks of a row, each of which has its own sums
    """

    kind: str
    rank: int
    accesses: tuple[Access, ...]
    single: bool
    exact: tuple[str, ...]
    wide: bool
    nested: bool = False
    whole: bool = False
    together: tuple[tuple[str, int], ...] = ()
    reload: bool = False
    hints: str = ""
    blocks: int = 0


@dataclass
class Scope:
    """Where columns are: per axis the name of the index and of its mask (None: every column exists)."""

    index: dict[str, str]
    mask: dict[str, str | None]
    suffix: str = ""
    pairs: dict[str, tuple[str, str | None]] = field(default_factory=dict)  # axis -> index and mask of 2 B interleaved columns
    written: set[int] = field(default_factory=set)
    running: dict[int, str] = field(default_factory=dict)  # maxima that a walk is still looking for, as they are so far
    again: frozenset[int] = frozenset()  # loads that a later walk along the row repeats: worth keeping in the cache


class Writer:
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

    # Tensors

    def pointer(self, name: str, lane: Lane | None, scope: Scope) -> str:
        base = f"p_{name}_row" if self._varies(name) else f"p_{name}"
        if lane is None:
            return f"{base} + unit" if self.schedule.single or not self._is_tall(name) else base
        column = scope.index[lane.axis]
        if lane.stride != 1:
            column = f"{lane.stride} * {column}"
        if lane.offset:
            column = f"{lane.offset} + {column}"
        if self.access[name].strided:
            column = f"({column}) * s_{name}_c"
        return f"{base} + {column}"

    def mask(self, name: str, lane: Lane | None, scope: Scope) -> str:
        """The text of a mask argument; empty where every element exists."""
        parts = [self.row_mask if self._is_tall(name) else None, None if lane is None else scope.mask[lane.axis]]
        return _mask_argument(parts)

    def load(self, value: int, scope: Scope) -> None:
        name, lane = self.program.nodes[value].attributes
        argument = self.program.argument(name)
        other = "" if not self.mask(name, lane, scope) else ", other=0" if argument.kind != "real" else ", other=0.0"
        convert = f".to({self.math})" if argument.kind == "real" and argument.dtype != self.program.math else ""
        twin = self._twin(name, lane)
        if twin is not None and lane.axis in scope.pairs:
            self._load_pair(value, twin, scope, other, convert)
        else:
            mask = self.mask(name, lane, scope)
            hint = self.hint(value, scope)
            pointer = self.pointer(name, lane, scope)
            if lane is not None and lane.axis in dict(self.schedule.together) and not self._is_tall(name):
                text = f"device.repeat_rows(tl.load({pointer} + {lane.axis}_together{mask}{other}{hint}){convert}, ROWS)"
            else:
                text = f"tl.load({pointer}{mask}{other}{hint}){convert}"
            self.line(f"{self.name(value, scope)} = {text}")

    def hint(self, value: int, scope: Scope) -> str:
        """What becomes of the loaded data in the cache."""
        if value in scope.again:
            return ', eviction_policy="evict_last"'
        name, lane = self.program.nodes[value].attributes
        if not self.schedule.hints or lane is None:
            return ""
        if self._varies(name):
            return ', eviction_policy="evict_first"'
        return "" if self.schedule.reload else ', eviction_policy="evict_last"'

    def is_reloaded(self, value: int) -> bool:
        """Whether a value that all rows share is loaded where it is used, not once before them."""
        return self.schedule.reload and self.program.extents[value].axis is not None

    def _load_pair(self, value: int, twin: Lane, scope: Scope, other: str, convert: str) -> None:
        name, lane = self.program.nodes[value].attributes
        partner = self.program.nodes.index(Node("load", (), (name, twin)))
        first, second = (value, partner) if lane.offset < twin.offset else (partner, value)
        pointer, mask, height = self._pair_access(name, min(lane, twin), scope)
        self.line(f"{name}_pair = tl.load({pointer}{mask}{other if mask else ''}){convert}")
        self.line(f"{self.name(first, scope)}, {self.name(second, scope)} = "
                  f"tl.split(tl.reshape({name}_pair, ({height}, B_{lane.axis}, 2)))")
        scope.written.add(partner)

    def _pair_access(self, name: str, first: Lane, scope: Scope) -> tuple[str, str, str]:
        index, mask = scope.pairs[first.axis]
        tall = self._is_tall(name)
        pointer = f"p_{name}{'_row' if self._varies(name) else ''} + {f'{first.offset} + ' if first.offset else ''}{index}"
        return pointer, _mask_argument([self.row_mask if tall else None, mask]), "ROWS" if tall else "1"

    def store(self, output: Output, scope: Scope, axis: str | None) -> None:
        """Stores the lanes of an output that lie on one axis (None: an output without columns)."""
        done: set[Lane | None] = set()
        for value, lane in output.stores:
            if (None if lane is None else lane.axis) != axis or lane in done:
                continue
            twin = self._twin(output.name, lane)
            if lane is not None and twin is not None:
                self._store_pair(output, lane, twin, scope)
                done.add(twin)
            else:
                text = self.rounded(value, output.dtype, scope)
                pointer, mask = self.pointer(output.name, lane, scope), self.mask(output.name, lane, scope)
                passing = ', cache_modifier=".cs"' if self.schedule.hints == "all" and lane is not None else ""
                self.line(f"tl.store({pointer}, {text}{mask}{passing})")

    def _store_pair(self, output: Output, lane: Lane, twin: Lane, scope: Scope) -> None:
        values = {stored: value for value, stored in output.stores}
        pointer, mask, height = self._pair_access(output.name, min(lane, twin), scope)
        shape = f"({height}, B_{lane.axis})"
        pair = ", ".join(f"tl.broadcast_to({self.rounded(values[x], output.dtype, scope)}, {shape})"
                         for x in sorted((lane, twin)))
        self.line(f"{output.name}_pair = tl.reshape(tl.join({pair}), ({height}, 2 * B_{lane.axis}))")
        self.line(f"tl.store({pointer}, {output.name}_pair{mask})")

    # Values

    def name(self, value: int, scope: Scope) -> str:
        node = self.program.nodes[value]
        suffix = "" if self.program.extents[value].axis is None else scope.suffix
        if node.op == "load":
            argument = node.attributes[0]
            return f"b_{argument}{suffix}" if len(self.program.loads(argument)) == 1 else f"b_{argument}_{value}{suffix}"
        return f"v{value}{suffix}"

    def operand(self, value: int, scope: Scope) -> str:
        """The text that stands for a value: its name, or for a few structural nodes what they stand for."""
        node = self.program.nodes[value]
        if node.op == "iota":
            return scope.index[node.attributes[0]]
        if node.op in ("check_index", "stop"):
            return self.operand(node.operands[0], scope)
        if value in scope.running:
            return scope.running[value]
        if node.op == "const":
            dtype = {"real": self.math, "int": "tl.int64", "bool": "tl.int1"}[self.program.kinds[value]]
            return f"tl.full((1, 1), {_literal(node.attributes[0])}, {dtype})"
        if node.op == "width":
            return f"tl.full((1, 1), W_{node.attributes[0]}, {self.math})"
        return self.name(value, scope)

    def rounded(self, value: int, dtype: str, scope: Scope) -> str:
        """The text of a value in the type it is stored in."""
        kind = self.program.kinds[value]
        return rounded(self.operand(value, scope), dtype, self.program.math if kind == "real" else kind)

    def values(self, wanted: Iterable[int], scope: Scope) -> None:
        """Writes values in program order; those already written in this scope are not written again."""
        for value in sorted(wanted):
            known = self.known if self.program.extents[value].axis is None else scope.written
            if value not in known:
                known.add(value)
                self.value(value, scope)

    def value(self, value: int, scope: Scope) -> None:
        node = self.program.nodes[value]
        if node.op in ("const", "iota", "width", "stop"):
            return
        if node.op == "load":
            self.load(value, scope)
        elif node.op == "check_index":
            index, axis = self.operand(node.operands[0], scope), node.attributes[0]
            self.line(f'tl.device_assert(({index} >= 0) & ({index} < W_{axis}), "index out of range of axis {axis}")')
        elif value in self.flow.gathers:
            self.gather(value, self.flow.gathers[value], scope)
        else:
            self.line(f"{self.name(value, scope)} = {self.expression(value, scope)}")

    def expression(self, value: int, scope: Scope) -> str:
        node = self.program.nodes[value]
        if node.op == "cast":
            return f"{self.rounded(node.operands[0], node.attributes[0], scope)}.to({self.math})"
        if node.op in REDUCTIONS:
            return self.reduction(node, scope)
        if node.op not in FUNCTIONS:
            raise EmissionError(f"%{value} = {node}: no lowering to Triton; use fxfuse.reference for this program")
        if node.op == "eq" and (index := one_hot_index(self.program, value)) is not None:
            # Compared in the narrow type of the column index: an index that names no column becomes -1, which equals none.
            axis = self.program.nodes[next(v for v in node.operands if v != index)].attributes[0]
            column, text = scope.index[axis], self.operand(index, scope)
            return f"({column} == tl.where(({text} >= 0) & ({text} < W_{axis}), {text}, -1).to({column}.dtype))"
        return self.function(value).format(*self.operands(node, scope))

    def function(self, value: int) -> str:
        """The Triton of a pointwise function: the table's, or a cheaper one that serves these operands as well."""
        nodes, extents = self.program.nodes, self.program.extents
        node = nodes[value]
        if node.op == "exp" and nodes[node.operands[0]].op == "sub":
            shift = nodes[nodes[node.operands[0]].operands[1]]
            if shift.op in ("stop", "max", "logsumexp"):
                return "device.exp_below({0})"
        if node.op == "div" and nodes[node.operands[1]].op == "const":
            mantissa, exponent = math.frexp(nodes[node.operands[1]].attributes[0])
            if mantissa == 0.5 and abs(exponent) < 100:  # exact, and no division
                return f"{{0}} * {_literal(2.0 ** (1 - exponent))}"
        if node.op == "div" and extents[node.operands[0]].axis is not None and extents[node.operands[1]].axis is None:
            divisor = nodes[node.operands[1]]
            if divisor.op == "const" and self.program.math == "float32" and 1e-30 < abs(divisor.attributes[0]) < 1e30:
                return f"{{0}} * {_literal(1.0 / divisor.attributes[0])}"
            return f"device.divide_by_row({{0}}, {{1}}{'' if self.is_exact(value) else ', exact=False'})"
        return FUNCTIONS[node.op].triton

    def is_exact(self, value: int) -> bool:
        """Whether a value is used otherwise than rounded to 16 bits, so that its last bits matter."""
        stored = [output.dtype for output in self.program.outputs for v, _ in output.stores if v == value]
        users = [self.program.nodes[v] for v in self.program.users[value]]
        rounded_to = [*stored, *(str(user.attributes[0]) if user.op == "cast" else "" for user in users)]
        return not all(dtype in ("float16", "bfloat16") for dtype in rounded_to)

    def operands(self, node: Node, scope: Scope) -> list[str]:
        """Operand texts: constants as literals where Triton types them by their neighbour, integers made real among reals."""
        kinds = [self.program.kinds[v] for v in node.operands]
        nodes = [self.program.nodes[v] for v in node.operands]
        arithmetic = slice(1, None) if node.op == "select" else slice(None)
        real = FUNCTIONS[node.op].result == "real" or (FUNCTIONS[node.op].result != "bool" and "real" in kinds[arithmetic])
        real = real or (node.op in OPERATORS and "real" in kinds)
        texts = []
        for k, (value, kind) in enumerate(zip(node.operands, kinds, strict=True)):
            literal = nodes[k].op == "const" and node.op in OPERATORS and any(n.op != "const" for n in nodes)
            if literal:
                texts.append(_literal(nodes[k].attributes[0]))
            elif real and kind != "real" and not (node.op == "select" and k == 0):
                texts.append(f"{self.operand(value, scope)}.to({self.math})")
            else:
                texts.append(self.operand(value, scope))
        if node.op == "real":
            return [f"{texts[0].removesuffix(f'.to({self.math})')}.to({self.math})"]
        return texts

    def masked(self, value: int, scope: Scope, identity: str) -> str:
        """A value with columns that do not exist replaced by the identity of a reduction."""
        mask = scope.mask[self.program.extents[value].axis or ""]
        text = self.operand(value, scope)
        if self.program.kinds[value] != "real":
            text = f"{text}.to({self.math})"
        return text if mask is None else f"tl.where({mask}, {text}, {identity})"

    def reduction(self, node: Node, scope: Scope) -> str:
        identity = {"sum": "0.0", "max": 'float("-inf")', "logsumexp": 'float("-inf")'}[node.op]
        text = self.masked(node.operands[0], scope, identity)
        if node.op == "sum":
            return f"tl.sum({text}, 1, keep_dims=True)"
        return f"device.row_{node.op}({text})"

    def gather(self, value: int, gather: Gather, scope: Scope) -> None:
        """The value of ``picked`` at column ``index``, 0 where the index names no column: one element read a row."""
        index, at = self.operand(gather.index, scope), f"at{value}"
        self.line(f"{at}_ok = ({index} >= 0) & ({index} < W_{gather.axis})")
        self.line(f"{at} = tl.where({at}_ok, {index}, 0)")
        sample = Scope({gather.axis: at}, {gather.axis: f"{at}_ok"}, suffix=f"_{at}")
        self.values(self.flow.column_part(gather.picked)[0], sample)
        self.line(f"v{value} = tl.where({at}_ok, {self.operand(gather.picked, sample)}, 0.0)")


def rounded(text: str, dtype: str, source: str) -> str:
    """A value of type ``source`` in the type it is stored in."""
    if dtype == source:
        return text
    if dtype in ("float16", "bfloat16"):
        return f"device.round_to({text}, tl.{dtype})"
    return f"{text}.to(tl.{'int1' if dtype == 'bool' else dtype})"


def _mask_argument(parts: Iterable[str | None]) -> str:
    text = " & ".join(part for part in parts if part)
    return f", mask={text}" if text else ""


def _literal(number: float | int | bool) -> str:
    if isinstance(number, float) and not math.isfinite(number):
        return f'float("{number}")'
    return repr(number)
