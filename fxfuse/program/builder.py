"""Building a program value by value."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from .parts import REDUCTIONS, Argument, Lane, Node, Output
from .whole import Program


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
        return self.node(Node("load", (), (name, lane)))

    def const(self, value: float | bool) -> int:
        return self.node(Node("const", (), (value,)))

    def apply(self, function: str, *operands: int) -> int:
        return self.node(Node(function, operands))

    def cast(self, dtype: str, operand: int) -> int:
        """Round to a dtype; the identity (no node) when the dtype is at least as wide as the arithmetic."""
        node = self.nodes[operand]
        if dtype in (self.math, "float64") or (node.op == "cast" and node.attributes == (dtype,)):
            return operand
        return self.node(Node("cast", (operand,), (dtype,)))

    def reduce(self, kind: str, axis: str, operand: int) -> int:
        return self.node(Node(kind, (operand,), (axis,)))

    def width(self, axis: str) -> int:
        """The number of columns of an axis, as a real scalar."""
        return self.node(Node("width", (), (axis,)))

    def iota(self, axis: str) -> int:
        """The column index along an axis, as an int value of column extent."""
        return self.node(Node("iota", (), (axis,)))

    def check_index(self, axis: str, operand: int) -> int:
        return self.node(Node("check_index", (operand,), (axis,)))

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

    def node(self, node: Node) -> int:
        """The value of a node, added if there is no equal one."""
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
