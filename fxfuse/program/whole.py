"""The row program itself: what it holds, what follows from it, and its text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from ..functions import FUNCTIONS, Kind
from .parts import REAL_DTYPES, REDUCTIONS, Argument, Extent, Node, Output
from .verification import verify


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
        verify(self)
        return self


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
