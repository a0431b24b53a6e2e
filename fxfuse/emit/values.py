"""Values: pointwise functions, casts, reductions and gathers as expressions between names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property, reduce

from ..dataflow import Gather, one_hot_index
from ..errors import EmissionError
from ..functions import FUNCTIONS
from ..program import REDUCTIONS, Node
from .absolute import SHORT, is_read_absolutely
from .loads import Loads
from .schedule import Scope

# 1 - 2 / (exp(2 x) + 1): within 5e-7 of tanh, not relative to it. The device function costs three times as many instructions.
QUICK_TANH = "1.0 - device.quotient(tl.full({0}.shape, 2.0, tl.float32), tl.exp2({0} * 2.8853900817779268) + 1.0)"
# Written as Python operators: a constant operand may stay a literal, which takes the type of the other operand.
OPERATORS = frozenset({"add", "sub", "mul", "lt", "le", "gt", "ge", "eq", "ne"})


class Values(Loads):
    """Writes the values of a program."""

    def operand(self, value: int, scope: Scope) -> str:
        """The text that stands for a value: its name, or for a few structural nodes what they stand for."""
        node = self.program.nodes[value]
        if node.op == "iota":
            return scope.index[node.attributes[0]]
        if node.op in ("check_index", "stop"):
            return self.operand(node.operands[0], scope)
        if value in scope.running:
            return scope.running[value]
        if value in self.guards:
            return self.operand(self.guards[value], scope)
        number = self.number(value)
        if number is not None and node.op != "width":
            dtype = {"real": self.math, "int": "tl.int64", "bool": "tl.int1"}[self.program.kinds[value]]
            return f"tl.full((1, 1), {_literal(number)}, {dtype})"
        if node.op == "width":
            return f"tl.full((1, 1), W_{node.attributes[0]}, {self.math})"
        return self.name(value, scope)

    def number(self, value: int) -> float | int | bool | None:
        """The number that a value always is: a constant, a width that the program fixes, a sum of such (the widths of both halves)."""
        node = self.program.nodes[value]
        if node.op == "const":
            return node.attributes[0]
        if node.op == "width":
            return dict(self.program.axes)[node.attributes[0]]
        if node.op == "add":
            parts = [self.number(operand) for operand in node.operands]
            return None if None in parts else float(sum(parts))  # type: ignore[arg-type]
        return None

    def rounded(self, value: int, dtype: str, scope: Scope) -> str:
        """The text of a value in the type it is stored in."""
        kind = self.program.kinds[value]
        return rounded(self.operand(value, scope), dtype, self.program.math if kind == "real" else kind)

    def values(self, wanted: Iterable[int], *scopes: Scope) -> None:
        """Writes values in program order, those with columns in every scope; what is written already is not written again.

        Several scopes are the segments of a row, held side by side: a reduction is of all of them."""
        for value in sorted(wanted):
            if self.program.extents[value].axis is None:
                if value not in self.known:
                    self.known.add(value)
                    self.value(value, *scopes)
                continue
            for scope in scopes:
                if value not in scope.written:
                    scope.written.add(value)
                    self.value(value, scope)

    def value(self, value: int, *scopes: Scope) -> None:
        scope = scopes[0]
        node = self.program.nodes[value]
        if node.op in ("iota", "width", "stop") or self.number(value) is not None or value in self.guards:
            return
        if node.op == "load":
            self.load(value, scope)
        elif node.op == "check_index":
            index, axis = self.operand(node.operands[0], scope), node.attributes[0]
            self.line(f'tl.device_assert(({index} >= 0) & ({index} < W_{axis}), "index out of range of axis {axis}")')
        elif value in self.flow.gathers:
            self.gather(value, self.flow.gathers[value], scope)
        else:
            self.line(f"{self.name(value, scope)} = {self.expression(value, *scopes)}")

    def expression(self, value: int, *scopes: Scope) -> str:
        scope = scopes[0]
        node = self.program.nodes[value]
        if node.op == "cast":
            real = self.program.kinds[node.operands[0]] == "real" and self.program.math == "float32"
            if self.schedule.pairs and real and node.attributes[0] == "bfloat16" and self.program.extents[value].axis is not None:
                return f"device.through_bfloat16({self.operand(node.operands[0], scope)})"
            return f"{self.rounded(node.operands[0], node.attributes[0], scope)}.to({self.math})"
        if node.op in REDUCTIONS:
            return self.reduction(node, *scopes)
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
                return "device.quick_exp({0})"
        if node.op == "exp" and not self.is_exact(value):
            return "device.quick_exp({0})"
        if node.op == "erf" and not self.is_exact(value) and self.is_added_to_a_constant(value):
            return "device.quick_erf({0})"
        if node.op == "tanh" and is_read_absolutely(self.program, value, self.flow.live):
            return QUICK_TANH
        if node.op == "div" and (number := self.number(node.operands[1])) is not None:
            mantissa, exponent = math.frexp(number)
            if mantissa == 0.5 and abs(exponent) < 100:  # exact, and no division
                return f"{{0}} * {_literal(2.0 ** (1 - exponent))}"
        if node.op == "div" and extents[node.operands[0]].axis is not None and extents[node.operands[1]].axis is None:
            divisor = nodes[node.operands[1]]
            if divisor.op == "const" and self.program.math == "float32" and 1e-30 < abs(divisor.attributes[0]) < 1e30:
                return f"{{0}} * {_literal(1.0 / divisor.attributes[0])}"
            return f"device.divide_by_row({{0}}, {{1}}{'' if self.is_exact(value) else ', exact=False'})"
        return FUNCTIONS[node.op].triton

    def is_exact(self, value: int) -> bool:
        """Whether the last bits of a value matter: something is made of it, rounded or not, that is stored in more than 16 bits."""
        return value in self.in_full

    def is_added_to_a_constant(self, value: int) -> bool:
        """Whether nothing else is made of a value than its sum with a number that is not small."""
        def large(v: int) -> bool:
            node = self.program.nodes[v]
            return node.op == "const" and abs(node.attributes[0]) >= 0.5

        users = [user for user in self.program.users[value] if user in self.flow.live]
        stored = any(v == value for output in self.program.outputs for v, _ in output.stores)
        return not stored and all(self.program.nodes[u].op == "add" and any(large(v) for v in self.program.nodes[u].operands)
                                  for u in users)

    @cached_property
    def in_full(self) -> set[int]:
        """The values that outputs of more than 16 bits are computed from, but for those that are rounded to 16 bits at once."""
        found: set[int] = set()
        todo = [value for output in self.program.outputs if output.dtype not in SHORT for value, _ in output.stores]
        while todo:
            value = todo.pop()
            if value not in found:
                found.add(value)
                node = self.program.nodes[value]
                todo.extend(node.operands if node.op != "cast" or node.attributes[0] not in SHORT else ())
        return found

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

    def reduction(self, node: Node, *scopes: Scope) -> str:
        """A reduction of a row, or of its segments: these are combined column by column first, so that threads wait for one another
        as often as they would for one."""
        if node.op == "sum":
            return f"tl.sum({self.summed(node.operands[0], *scopes)}, 1, keep_dims=True)"
        texts = [self.masked(node.operands[0], scope, 'float("-inf")') for scope in scopes]
        if node.op == "logsumexp" and len(texts) > 1:
            # log(sum(exp(x))) = peak + log(sum(exp(x - peak))), with the peak of all segments.
            self.line(f"peak = device.finite_or_zero({row_max(texts)})")
            terms = " + ".join(f"device.quick_exp({text} - peak)" for text in texts)
            return f"device.log(tl.sum({terms}, 1, keep_dims=True)) + peak"
        return row_max(texts) if node.op == "max" else f"device.row_{node.op}({texts[0]})"

    def summed(self, value: int, *scopes: Scope) -> str:
        """What is to be summed along a row: a value, or the sum of it over the segments of the row."""
        return " + ".join(self.masked(value, scope, "0.0") for scope in scopes)

    def gather(self, value: int, gather: Gather, scope: Scope) -> None:
        """The value of ``picked`` at column ``index``, 0 where the index names no column: one element read a row."""
        index, at = self.operand(gather.index, scope), f"at{value}"
        self.line(f"{at}_ok = ({index} >= 0) & ({index} < W_{gather.axis})")
        self.line(f"{at} = tl.where({at}_ok, {index}, 0)")
        sample = Scope({gather.axis: at}, {gather.axis: f"{at}_ok"}, suffix=f"_{at}")
        self.values(self.flow.column_part(gather.picked)[0], sample)
        self.line(f"v{value} = tl.where({at}_ok, {self.operand(gather.picked, sample)}, 0.0)")


def row_max(texts: Sequence[str]) -> str:
    """The maximum of a row that lies in some segments."""
    return f"device.row_max({reduce(lambda a, b: f'device.maximum({a}, {b})', texts)})"


def rounded(text: str, dtype: str, source: str) -> str:
    """A value of type ``source`` in the type it is stored in."""
    if dtype == source:
        return text
    if dtype in ("float16", "bfloat16"):
        return f"device.round_to({text}, tl.{dtype})"
    return f"{text}.to(tl.{'int1' if dtype == 'bool' else dtype})"


def _literal(number: float | int | bool) -> str:
    if isinstance(number, float) and not math.isfinite(number):
        return f'float("{number}")'
    return repr(number)
