"""Loads: a lane of an argument, or two interleaved lanes at once, and what becomes of the data in the cache."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

from ..program import Lane, Node
from .addresses import Addresses
from .schedule import Scope


class Loads(Addresses):
    """Writes the loads of a program."""

    def name(self, value: int, scope: Scope) -> str:
        node = self.program.nodes[value]
        suffix = "" if self.program.extents[value].axis is None else scope.suffix
        if node.op == "load":
            argument = node.attributes[0]
            return f"b_{argument}{suffix}" if len(self.program.loads(argument)) == 1 else f"b_{argument}_{value}{suffix}"
        return f"v{value}{suffix}"

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

    def mask(self, name: str, lane: Lane | None, scope: Scope, guard: str | None = None) -> str:
        """The text of a mask argument; empty where every element exists. ``guard``: one more condition."""
        parts = [self.row_mask if self._is_tall(name) else None, None if lane is None else scope.mask[lane.axis], guard]
        return mask_argument(parts)

    @cached_property
    def guards(self) -> dict[int, int]:
        """Loads that are looked at behind a condition of their row alone, ``select(condition, x, 0)``: by the select, the load.

        Such a load is masked by the condition, and the select is the load: a row that does not read its columns costs no traffic, and
        one that does no arithmetic. Where a tile is one row, whose numbers are known before its columns are walked.
        """
        found: dict[int, int] = {}
        if self.schedule.kind != "looped" or not self.schedule.single:
            return found
        nodes, extents = self.program.nodes, self.program.extents
        for value, node in enumerate(nodes):
            if node.op != "select" or nodes[node.operands[1]].op != "load" or extents[node.operands[1]].axis is None:
                continue
            condition, load, other = node.operands
            zero = nodes[other].op == "const" and nodes[other].attributes[0] == 0.0
            known = condition < load and extents[condition].axis is None and self.flow.depth[condition] == 0
            if zero and known and self.program.users[load] == (value,):
                found[value] = load
        return found

    def guard_of(self, load: int) -> str | None:
        """The name of the condition that a load is masked by."""
        guarded = next((select for select, other in self.guards.items() if other == load), None)
        return None if guarded is None else f"v{self.program.nodes[guarded].operands[0]}"

    def load(self, value: int, scope: Scope) -> None:
        name, lane = self.program.nodes[value].attributes
        argument = self.program.argument(name)
        guard = self.guard_of(value)
        other = "" if not self.mask(name, lane, scope, guard) else ", other=0" if argument.kind != "real" else ", other=0.0"
        convert = f".to({self.math})" if argument.kind == "real" and argument.dtype != self.program.math else ""
        twin = self._twin(name, lane)
        if twin is not None and lane.axis in scope.pairs:
            self._load_pair(value, twin, scope, other, convert)
        else:
            mask = self.mask(name, lane, scope, guard)
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
        again = self.schedule.reload or (self.schedule.early and self.schedule.blocks > 0)
        return again and self.program.extents[value].axis is not None

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
        return pointer, mask_argument([self.row_mask if tall else None, mask]), "ROWS" if tall else "1"


def mask_argument(parts: Iterable[str | None]) -> str:
    text = " & ".join(part for part in parts if part)
    return f", mask={text}" if text else ""
