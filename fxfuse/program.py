"""The row program: the intermediate representation of a fusible region.

A program's domain is *rows x columns*. Rows are the leading dimensions (``rank`` of them, sizes known at run time only);
columns are the last dimension, cut into named *axes*. An axis is a run of columns that is worked on together: the whole last
dimension of a norm, or each half of a rotary head. A *lane* says where an axis lies in a tensor's last dimension: ``offset +
stride * i``. So ``rotate_half``, interleaved and partial rotary, and packed ``gate_up`` are pointwise over lanes, and copy nothing.

Values are in static single assignment. Each has a kind (real, int, bool) and an *extent*: does it vary over rows, and over which
axis, if any. Real arithmetic happens in the program's ``math`` dtype (float32, or float64 when an argument is float64); rounding
happens at ``cast`` and when an output is stored, nowhere else.

    program rank=2 math=float32
    axis a = ?
    arg x : bfloat16[r,r|a]
    arg w : bfloat16[1,1|a]
    %0 = load x a 0 1
    %1 = square %0
    %2 = sum a %1
    %3 = width a
    %4 = div %2 %3
    ...
    out y : bfloat16[r,r|a] = %9 @ a 0 1

The text is canonical: ``parse(str(p)) == p``, and it is what the fused op carries.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

from .errors import FxfuseError
from .functions import FUNCTIONS, Kind

REDUCTIONS = ("sum", "max", "logsumexp")
REAL_DTYPES = ("float16", "bfloat16", "float32", "float64")
INT_DTYPES = ("int32", "int64")
# Operations that are neither a table function nor a reduction, with what follows the name in the text.
STRUCTURAL = ("load", "const", "cast", "iota", "width", "check_index")


class ProgramError(FxfuseError):
    """A row program breaks a rule of the representation; the message names the value."""


class Lane(NamedTuple):
    """Columns ``offset + stride * i`` of a tensor's last dimension, i running over ``axis``."""

    axis: str
    offset: int = 0
    stride: int = 1

    def __str__(self) -> str:
        return f"{self.axis} {self.offset} {self.stride}"


class Extent(NamedTuple):
    """Does a value vary over rows; over which column axis (None: over none)."""

    row: bool
    axis: str | None

    def join(self, other: Extent) -> Extent:
        if self.axis is not None and other.axis is not None and self.axis != other.axis:
            raise ProgramError(f"a pointwise operation mixes the axes {self.axis!r} and {other.axis!r}")
        return Extent(self.row or other.row, self.axis or other.axis)


@dataclass(frozen=True)
class Argument:
    """A tensor argument. ``rows[d]`` is False where leading dimension d has size 1 and is broadcast.

    ``columns`` is the size of the last dimension: an axis name (the axis covers it), an int (several lanes), or None for a tensor
    without columns, whose last dimension has size 1.
    """

    name: str
    dtype: str
    rows: tuple[bool, ...]
    columns: int | str | None

    @property
    def kind(self) -> Kind:
        return "real" if self.dtype in REAL_DTYPES else "bool" if self.dtype == "bool" else "int"

    def __str__(self) -> str:
        return f"{self.name} : {self.dtype}[{_shape_text(self.rows, self.columns)}]"


@dataclass(frozen=True)
class Output:
    """A tensor result: ``stores`` place values at lanes (lane None: a value without columns, stored in a last dimension of size 1).

    Where ``rows[d]`` is False the value is summed over leading dimension d (the gradient of a broadcast operand).
    """

    name: str
    dtype: str
    rows: tuple[bool, ...]
    columns: int | str | None
    stores: tuple[tuple[int, Lane | None], ...]

    @property
    def sums_rows(self) -> bool:
        return not all(self.rows)

    def __str__(self) -> str:
        stores = ", ".join(
            f"%{value}" if lane is None else f"%{value} @ {lane}" for value, lane in self.stores
        )
        return f"{self.name} : {self.dtype}[{_shape_text(self.rows, self.columns)}] = {stores}"


@dataclass(frozen=True)
class Node:
    """One value: ``op`` applied to earlier values. ``attributes``:

    load (argument name, Lane or None) | const (number,) | cast (dtype,) | iota, width, check_index (axis,) |
    sum, max, logsumexp (axis,) | a function of functions.FUNCTIONS: ().

    ``check_index`` returns its int operand and fails, as eager's loss does, unless 0 <= index < width.
    """

    op: str
    operands: tuple[int, ...] = ()
    attributes: tuple = ()

    def __str__(self) -> str:
        words = [self.op, *(_attribute_text(a) for a in self.attributes), *(f"%{v}" for v in self.operands)]
        return " ".join(words)


@dataclass(frozen=True)
class Program:
    """A verified-on-demand row program; immutable, compared and hashed by value."""

    rank: int
    math: str
    axes: tuple[tuple[str, int | None], ...]
    arguments: tuple[Argument, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[Output, ...]

    def __str__(self) -> str:
        return "\n".join(
            [
                f"program rank={self.rank} math={self.math}",
                *(f"axis {name} = {'?' if width is None else width}" for name, width in self.axes),
                *(f"arg {argument}" for argument in self.arguments),
                *(f"%{i} = {node}" for i, node in enumerate(self.nodes)),
                *(f"out {output}" for output in self.outputs),
            ]
        )

    def argument(self, name: str) -> Argument:
        return self.arguments[self.argument_index[name]]

    @cached_property
    def argument_index(self) -> dict[str, int]:
        return {argument.name: i for i, argument in enumerate(self.arguments)}

    def width(self, axis: str) -> int | None:
        """The static width of an axis, or None when it is known at run time only."""
        return dict(self.axes)[axis]

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        kinds: list[Kind] = []
        for node in self.nodes:
            kinds.append(_kind(self, node, kinds))
        return tuple(kinds)

    @cached_property
    def extents(self) -> tuple[Extent, ...]:
        extents: list[Extent] = []
        for node in self.nodes:
            extents.append(_extent(self, node, extents))
        return tuple(extents)

    @cached_property
    def users(self) -> tuple[tuple[int, ...], ...]:
        users: list[list[int]] = [[] for _ in self.nodes]
        for i, node in enumerate(self.nodes):
            for operand in node.operands:
                users[operand].append(i)
        return tuple(map(tuple, users))

    def loads(self, name: str) -> list[int]:
        """The values loaded from one argument."""
        return [i for i, node in enumerate(self.nodes) if node.op == "load" and node.attributes[0] == name]

    def retyped(self, dtypes: dict[str, str]) -> Program:
        """The same program with real dtypes replaced (an instance for another precision); math follows.

        ``p.retyped({"bfloat16": "float32"})`` is the float32 instance; casts become casts to the new dtype (identities).
        """
        new = {dtype: dtypes.get(dtype, dtype) for dtype in REAL_DTYPES}
        arguments = tuple(replace(a, dtype=new.get(a.dtype, a.dtype)) for a in self.arguments)
        nodes = tuple(
            replace(n, attributes=(new[n.attributes[0]],)) if n.op == "cast" else n for n in self.nodes
        )
        outputs = tuple(replace(o, dtype=new.get(o.dtype, o.dtype)) for o in self.outputs)
        used = {new[self.math], *(a.dtype for a in arguments)}
        return Program(
            self.rank, "float64" if "float64" in used else "float32", self.axes, arguments, nodes, outputs
        )

    def verify(self) -> Program:
        """Check the rules of the representation; returns self, raises ProgramError with the offending line."""
        _verify(self)
        return self


def _shape_text(rows: tuple[bool, ...], columns: int | str | None) -> str:
    return (
        ",".join("r" if varies else "1" for varies in rows) + "|" + ("" if columns is None else str(columns))
    )


def _attribute_text(attribute: object) -> str:
    return repr(attribute) if isinstance(attribute, float) else str(attribute)


def _kind(program: Program, node: Node, kinds: list[Kind]) -> Kind:
    if node.op == "load":
        return program.argument(node.attributes[0]).kind
    if node.op == "const":
        value = node.attributes[0]
        return "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "real"
    if node.op in ("iota", "check_index"):
        return "int"
    if node.op in FUNCTIONS:
        result = FUNCTIONS[node.op].result
        return kinds[node.operands[-1]] if result == "same" else result
    return "real"


def _extent(program: Program, node: Node, extents: list[Extent]) -> Extent:
    if node.op == "load":
        name, lane = node.attributes
        return Extent(any(program.argument(name).rows), None if lane is None else lane.axis)
    if node.op == "iota":
        return Extent(False, node.attributes[0])
    joined = Extent(False, None)
    for operand in node.operands:
        joined = joined.join(extents[operand])
    return Extent(joined.row, None) if node.op in REDUCTIONS else joined


def _verify(program: Program) -> None:
    axes = dict(program.axes)
    for i, node in enumerate(program.nodes):
        where = f"%{i} = {node}"
        if any(operand >= i or operand < 0 for operand in node.operands):
            raise ProgramError(f"{where}: uses a value that is not defined before it")
        if node.op in FUNCTIONS:
            if len(node.operands) != FUNCTIONS[node.op].arity:
                raise ProgramError(f"{where}: {node.op} takes {FUNCTIONS[node.op].arity} operands")
        elif node.op in REDUCTIONS:
            if program.extents[node.operands[0]].axis != node.attributes[0]:
                raise ProgramError(
                    f"{where}: reduces axis {node.attributes[0]!r} of a value that does not vary over it"
                )
        elif node.op not in STRUCTURAL:
            raise ProgramError(f"{where}: unknown operation {node.op!r}")
    _ = program.kinds, program.extents
    for argument in program.arguments:
        _verify_lanes(argument, [program.nodes[i].attributes[1] for i in program.loads(argument.name)], axes)
    for output in program.outputs:
        _verify_lanes(output, [lane for _, lane in output.stores], axes)
        for value, lane in output.stores:
            if lane is not None and program.extents[value].axis not in (None, lane.axis):
                raise ProgramError(f"output {output.name}: %{value} does not vary over axis {lane.axis!r}")
            if lane is None and program.extents[value].axis is not None:
                raise ProgramError(f"output {output.name}: %{value} has columns, the output has none")


def _verify_lanes(tensor: Argument | Output, lanes: list[Lane | None], axes: dict[str, int | None]) -> None:
    """Lanes of one tensor are equal or disjoint, and lie inside its columns."""
    if len(tensor.rows) != 0 and not all(isinstance(flag, bool) for flag in tensor.rows):
        raise ProgramError(f"{tensor.name}: row flags must be bool")
    claimed: dict[int, Lane] = {}
    for lane in lanes:
        if (lane is None) != (tensor.columns is None):
            raise ProgramError(f"{tensor.name}: a tensor has columns exactly if it is accessed through lanes")
        if lane is None:
            continue
        if isinstance(tensor.columns, str):
            if lane != Lane(tensor.columns):
                raise ProgramError(
                    f"{tensor.name}: covered by axis {tensor.columns!r} but accessed at {lane}"
                )
            continue
        width = axes[lane.axis]
        if width is None or tensor.columns is None:
            raise ProgramError(f"{tensor.name}: the lane {lane} needs a static width")
        for column in range(lane.offset, lane.offset + lane.stride * width, lane.stride):
            if column >= tensor.columns or claimed.setdefault(column, lane) != lane:
                raise ProgramError(
                    f"{tensor.name}: lane {lane} leaves the tensor or overlaps {claimed.get(column)}"
                )


@lru_cache(maxsize=4096)
def parse(text: str) -> Program:
    """The program that printed this text."""
    rank, math = 0, "float32"
    axes: list[tuple[str, int | None]] = []
    arguments: list[Argument] = []
    nodes: list[Node] = []
    outputs: list[Output] = []
    for line in text.splitlines():
        head, _, rest = line.strip().partition(" ")
        if head == "program":
            settings = dict(word.split("=") for word in rest.split())
            rank, math = int(settings["rank"]), settings["math"]
        elif head == "axis":
            name, _, width = rest.split()
            axes.append((name, None if width == "?" else int(width)))
        elif head == "arg":
            name, _, shape = rest.split()
            arguments.append(Argument(name, *_parse_shape(shape)))
        elif head == "out":
            declaration, _, stores = rest.partition(" = ")
            name, _, shape = declaration.split()
            outputs.append(
                Output(name, *_parse_shape(shape), tuple(_parse_store(s) for s in stores.split(", ")))
            )
        elif head.startswith("%"):
            nodes.append(_parse_node(rest.removeprefix("= ").split()))
        elif head:
            raise ProgramError(f"not a line of a row program: {line!r}")
    return Program(rank, math, tuple(axes), tuple(arguments), tuple(nodes), tuple(outputs))


def _parse_shape(text: str) -> tuple[str, tuple[bool, ...], int | str | None]:
    dtype, _, inside = text.removesuffix("]").partition("[")
    rows, _, columns = inside.partition("|")
    flags = tuple(flag == "r" for flag in rows.split(",") if flag)
    return dtype, flags, None if not columns else int(columns) if columns.isdigit() else columns


def _parse_store(text: str) -> tuple[int, Lane | None]:
    value, _, lane = text.partition(" @ ")
    return int(value.strip()[1:]), _parse_lane(lane.split()) if lane else None


def _parse_lane(words: list[str]) -> Lane:
    return Lane(words[0], int(words[1]), int(words[2]))


def _parse_node(words: list[str]) -> Node:
    op = words[0]
    operands = tuple(int(word[1:]) for word in words if word.startswith("%"))
    plain = [word for word in words[1:] if not word.startswith("%")]
    if op == "load":
        return Node(op, (), (plain[0], None if plain[1] == "None" else _parse_lane(plain[1:])))
    if op == "const":
        return Node(op, (), (_parse_number(plain[0]),))
    return Node(op, operands, tuple(plain))


def _parse_number(text: str) -> float | int | bool:
    if text in ("True", "False"):
        return text == "True"
    try:
        return int(text)
    except ValueError:
        return float(text)


@dataclass
class ProgramBuilder:
    """Builds a program value by value, sharing equal values (hash-consing) and dropping dead ones at ``build``."""

    rank: int
    math: str = "float32"
    axes: dict[str, int | None] = field(default_factory=dict)
    arguments: list[Argument] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    _index: dict[tuple[Node, tuple[type, ...]], int] = field(default_factory=dict)

    def axis(self, width: int | None, name: str | None = None) -> str:
        """Declare a column axis; returns its name."""
        name = name or f"c{len(self.axes)}"
        self.axes[name] = width
        return name

    def argument(self, name: str, dtype: str, rows: tuple[bool, ...], columns: int | str | None) -> str:
        self.arguments.append(Argument(name, dtype, rows, columns))
        if dtype == "float64":
            self.math = "float64"
        return name

    def load(self, name: str, lane: Lane | None) -> int:
        return self._add(Node("load", (), (name, lane)))

    def const(self, value: float | bool) -> int:
        return self._add(Node("const", (), (value,)))

    def apply(self, function: str, *operands: int) -> int:
        return self._add(Node(function, operands))

    def cast(self, dtype: str, operand: int) -> int:
        """Round to a dtype; the identity (no node) when the dtype is at least as wide as the arithmetic."""
        node = self.nodes[operand]
        if dtype in (self.math, "float64") or (node.op == "cast" and node.attributes == (dtype,)):
            return operand
        return self._add(Node("cast", (operand,), (dtype,)))

    def reduce(self, kind: str, axis: str, operand: int) -> int:
        return self._add(Node(kind, (operand,), (axis,)))

    def width(self, axis: str) -> int:
        """The number of columns of an axis, as a real scalar."""
        return self._add(Node("width", (), (axis,)))

    def iota(self, axis: str) -> int:
        """The column index along an axis, as an int value of column extent."""
        return self._add(Node("iota", (), (axis,)))

    def check_index(self, axis: str, operand: int) -> int:
        return self._add(Node("check_index", (operand,), (axis,)))

    def output(
        self,
        name: str,
        dtype: str,
        rows: tuple[bool, ...],
        columns: int | str | None,
        stores: tuple[tuple[int, Lane | None], ...],
    ) -> None:
        self.outputs.append(Output(name, dtype, rows, columns, stores))

    def build(self) -> Program:
        """The finished program: dead values dropped, verified."""
        alive = {value for output in self.outputs for value, _ in output.stores}
        for i in reversed(range(len(self.nodes))):
            if i in alive:
                alive.update(self.nodes[i].operands)
        renumbered = {old: new for new, old in enumerate(sorted(alive))}
        nodes = tuple(
            replace(self.nodes[old], operands=tuple(renumbered[v] for v in self.nodes[old].operands))
            for old in sorted(alive)
        )
        outputs = tuple(
            replace(o, stores=tuple((renumbered[v], lane) for v, lane in o.stores)) for o in self.outputs
        )
        loaded = {node.attributes[0] for node in nodes if node.op == "load"}
        arguments = tuple(a for a in self.arguments if a.name in loaded)
        used = _used_axes(nodes, outputs)
        axes = tuple((name, width) for name, width in self.axes.items() if name in used)
        return Program(self.rank, self.math, axes, arguments, nodes, outputs).verify()

    def find(self, node: Node) -> int | None:
        """The value of an equal node, if there is one already."""
        return self._index.get(_key(node))

    def _add(self, node: Node) -> int:
        key = _key(node)
        if key not in self._index:
            self._index[key] = len(self.nodes)
            self.nodes.append(node)
        return self._index[key]


def _key(node: Node) -> tuple[Node, tuple[type, ...]]:
    """What makes two nodes the same: 1, 1.0 and True are equal, but not the same constant."""
    return node, tuple(map(type, node.attributes))


def _used_axes(nodes: tuple[Node, ...], outputs: tuple[Output, ...]) -> set[str]:
    used = {lane.axis for output in outputs for _, lane in output.stores if lane is not None}
    for node in nodes:
        if node.op == "load" and node.attributes[1] is not None:
            used.add(node.attributes[1].axis)
        elif node.op in ("iota", "width", "check_index", *REDUCTIONS):
            used.add(node.attributes[0])
    return used
