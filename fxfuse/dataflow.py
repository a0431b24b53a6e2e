"""What a schedule must know of a row program: which values are live, which reductions wait for which, and what is a mere gather."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from .program import REDUCTIONS, Node, Program


@dataclass(frozen=True)
class Gather:
    """``sum(select(eq(iota, index), picked, 0))``: the value of ``picked`` at one column, read instead of summed."""

    axis: str
    index: int
    picked: int


@dataclass(frozen=True)
class Dataflow:
    """What a schedule must know of a program: gathers, live values, and how many reductions lie below each value."""

    program: Program

    @cached_property
    def gathers(self) -> dict[int, Gather]:
        found = {i: _gather(self.program, node) for i, node in enumerate(self.program.nodes)}
        return {i: gather for i, gather in found.items() if gather is not None}

    def is_reduction(self, value: int) -> bool:
        """A reduction that walks the columns (a gather does not)."""
        return self.program.nodes[value].op in REDUCTIONS and value not in self.gathers

    def column_part(self, value: int) -> tuple[list[int], list[int]]:
        """The values with columns that ``value`` is computed from, itself included, and those without columns that feed them."""
        inside, feeding, todo = set(), set(), [value]
        while todo:
            i = todo.pop()
            if self.program.extents[i].axis is None:
                feeding.add(i)
            elif i not in inside:
                inside.add(i)
                todo.extend(self.program.nodes[i].operands)
        return sorted(inside), sorted(feeding)

    def needs(self, value: int) -> tuple[int, ...]:
        gather = self.gathers.get(value)
        if gather is None:
            return self.program.nodes[value].operands
        return (gather.index, *self.column_part(gather.picked)[1])

    @cached_property
    def live(self) -> list[int]:
        """Values that outputs need, in order; what only a gather's sum needed is not among them."""
        alive: set[int] = set()
        todo = [value for output in self.program.outputs for value, _ in output.stores]
        while todo:
            i = todo.pop()
            if i not in alive:
                alive.add(i)
                todo.extend(self.needs(i))
        return sorted(alive)

    @property
    def depth(self) -> list[int]:
        """Walks along the columns on the longest path to each value: the one after which it is known."""
        return self._walks[0]

    @property
    def online(self) -> dict[int, int]:
        """Sums that are known together with the maximum they are shifted by: ``sum(exp(x - m) * w)`` -> m.

        What the maximum was thought to be so far factors out of every term, so that one walk along the row gives both.
        """
        return self._walks[1]

    @cached_property
    def _walks(self) -> tuple[list[int], dict[int, int]]:
        depths: list[int] = []
        online: dict[int, int] = {}
        for i, node in enumerate(self.program.nodes):
            peak = self._shift(node.operands[0], depths) if node.op == "sum" and i not in self.gathers else None
            if peak is None:
                depths.append(max((depths[v] for v in self.needs(i)), default=0) + self.is_reduction(i))
            else:
                online[i] = peak
                depths.append(depths[peak])
        return depths, online

    def _shift(self, value: int, depths: list[int]) -> int | None:
        """The maximum m by which a value is shifted: it is ``exp(x - m)``, perhaps times what is known before m."""
        node = self.program.nodes[value]
        if node.op == "exp":
            return self._subtracted_maximum(node.operands[0], depths)
        if node.op in ("mul", "div"):
            for shifted, other in (node.operands, node.operands[::-1])[:2 if node.op == "mul" else 1]:
                peak = self._shift(shifted, depths)
                if peak is not None and depths[other] < depths[peak]:
                    return peak
        return None

    def _subtracted_maximum(self, value: int, depths: list[int]) -> int | None:
        """m, if the value is ``x - m`` with a maximum m along the columns of x, and x is known before it."""
        node = self.program.nodes[value]
        if node.op != "sub":
            return None
        x, shift = node.operands
        peak = self.program.nodes[shift].operands[0] if self.program.nodes[shift].op == "stop" else shift
        maximum = self.program.nodes[peak]
        same = maximum.op == "max" and maximum.attributes == (self.program.extents[x].axis,)
        return peak if same and depths[x] < depths[peak] else None

    def below(self, value: int) -> list[int]:
        """Everything a value is computed from, itself included."""
        found, todo = set(), [value]
        while todo:
            i = todo.pop()
            if i not in found:
                found.add(i)
                todo.extend(self.needs(i))
        return sorted(found)

    @cached_property
    def sums_together(self) -> list[list[int]]:
        """Groups of two or three sums over the same columns of all rows, none of which waits for another, in the order of waiting."""
        groups: dict[tuple[int, str], list[int]] = {}
        for i in self.live:
            node = self.program.nodes[i]
            if node.op == "sum" and self.is_reduction(i) and i not in self.online and self.program.extents[node.operands[0]].row:
                groups.setdefault((self.depth[i], node.attributes[0]), []).append(i)
        return [group for _, group in sorted(groups.items()) if 2 <= len(group) <= 3]

    @cached_property
    def has_reductions(self) -> bool:
        return any(self.is_reduction(i) for i in self.live)


def _gather(program: Program, node: Node) -> Gather | None:
    if node.op != "sum":
        return None
    select = program.nodes[node.operands[0]]
    if select.op != "select" or program.nodes[select.operands[2]] not in (Node("const", (), (0.0,)), Node("const", (), (0,))):
        return None
    index = one_hot_index(program, select.operands[0])
    axis = node.attributes[0]
    picked = select.operands[1]
    return None if index is None or program.extents[picked].axis != axis else Gather(axis, index, picked)


def one_hot_index(program: Program, condition: int) -> int | None:
    """The value ``index`` (int, without columns) if the condition is ``iota == index``."""
    node = program.nodes[condition]
    if node.op != "eq":
        return None
    for a, b in (node.operands, node.operands[::-1]):
        if program.nodes[a].op == "iota" and program.kinds[b] == "int" and program.extents[b].axis is None:
            return b
    return None
