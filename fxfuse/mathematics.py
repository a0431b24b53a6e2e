"""A row program as equations between sympy expressions: to be read and printed, not computed with.

Each row statistic that columns read, and each longer value that is used twice, gets a letter; everything else is written out. Sums over
a row's columns are ``Sum_j``, sums over rows ``Sum_rows``; rounding to a narrower dtype is a function of the dtype's name.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import sympy
from sympy.printing.latex import LatexPrinter
from sympy.printing.printer import Printer
from sympy.printing.str import StrPrinter

from .derivation import exact
from .functions import FUNCTIONS
from .program import REDUCTIONS, Lane, Node, Output, Program
from .residuals import STATISTIC


class SumOverColumns(sympy.Function):
    """sum_j x_j"""


class MaxOverColumns(sympy.Function):
    """max_j x_j"""


class SumOverRows(sympy.Function):
    """The sum over the rows that share an operand."""


SHORT_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
LETTERS = {"rsqrt": "r", "sqrt": "r", "logsumexp": "l", "max": "m"}
_RELATIONS = {"lt": sympy.Lt, "le": sympy.Le, "gt": sympy.Gt, "ge": sympy.Ge, "eq": sympy.Eq, "ne": sympy.Ne}


@dataclass(frozen=True)
class Equations:
    """``definitions``: the letters, in order of use; ``results``: a symbol for each store of each output, and what it is."""

    definitions: tuple[sympy.Eq, ...]
    results: tuple[sympy.Eq, ...]
    symbols: Mapping[int, sympy.Expr]  # the letter of a value

    def __iter__(self) -> Iterator[sympy.Eq]:
        return itertools.chain(self.definitions, self.results)


def equations(program: Program, known: Mapping[str, sympy.Expr] | None = None, letter: str = "u") -> Equations:
    """The equations of a program. known: what to call an argument; letter: for values that have no letter of their own."""
    return _Reader(program, dict(known or {}), letter).read()


@dataclass
class _Reader:
    program: Program
    known: dict[str, sympy.Expr]
    letter: str
    values: list[sympy.Expr] = field(default_factory=list)
    definitions: list[sympy.Eq] = field(default_factory=list)
    letters: dict[int, sympy.Expr] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    statistics: set[int] = field(default_factory=set)

    def read(self) -> Equations:
        self.taken = {a.name for a in self.program.arguments} | {str(e) for e in self.known.values()}
        self.taken |= {o.name for o in self.program.outputs} | {"n", "j"}
        self.statistics = {o.stores[0][0] for o in self.program.outputs if o.name.startswith(STATISTIC)}
        for value, node in enumerate(self.program.nodes):
            expression = self.expression(node, [self.values[v] for v in node.operands])
            self.values.append(self.named(value, node, expression) if self.wants_letter(value) else expression)
        results = [equation for output in self.program.outputs for equation in self.stored(output)]
        return Equations(tuple(self.definitions), tuple(results), self.letters)

    def wants_letter(self, value: int) -> bool:
        """A row statistic that columns read; a value of several operations that several values read."""
        program = self.program
        if program.nodes[value].op in ("load", "const", "width", "iota", "cast", "real", "stop"):
            return False
        if value in self.statistics or (program.nodes[value].op == "select" and program.kinds[value] == "int"):
            return True
        extent = program.extents[value]
        if extent.axis is None:
            reduced = any(program.nodes[v].op in REDUCTIONS for v in self._behind(value))
            return reduced and any(program.extents[user].axis is not None for user in program.users[value])
        readers = [user for user in program.users[value] if program.nodes[user].op not in ("cast", "stop")]
        return len(readers) > 1 and len(self._behind(value)) > 5

    def _behind(self, value: int) -> set[int]:
        """The values that an expression is written with, up to letters."""
        seen, pending = {value}, list(self.program.nodes[value].operands)
        while pending:
            v = pending.pop()
            if v not in seen and v not in self.letters:
                seen.add(v)
                pending.extend(self.program.nodes[v].operands)
        return seen

    def named(self, value: int, node: Node, expression: sympy.Expr) -> sympy.Expr:
        if expression.is_Atom:
            return expression
        if self.program.kinds[value] == "int":
            symbol = sympy.Symbol(self.fresh("k"), integer=True)
        else:
            symbol = sympy.Symbol(self.fresh(LETTERS.get(node.op, self.letter)), real=True)
        self.definitions.append(sympy.Eq(symbol, expression, evaluate=False))
        self.letters[value] = symbol
        return symbol

    def fresh(self, letter: str) -> str:
        name = next(n for n in itertools.chain([letter], (f"{letter}_{i}" for i in itertools.count(1))) if n not in self.taken)
        self.taken.add(name)
        return name

    def expression(self, node: Node, operands: list[sympy.Expr]) -> sympy.Expr:
        op = node.op
        if op == "load":
            return self.loaded(*node.attributes)
        if op == "const":
            number = node.attributes[0]
            return sympy.true if number is True else sympy.false if number is False else exact(number)
        if op == "cast":
            return sympy.Function(SHORT_DTYPES[node.attributes[0]])(operands[0])
        if op in ("real", "stop", "check_index"):
            return operands[0]
        if op == "width":
            return sympy.Symbol("n", positive=True)
        if op == "iota":
            return sympy.Symbol("j", integer=True)
        if op in _WRITTEN:
            return _WRITTEN[op](*operands)
        if op in _RELATIONS:
            return _RELATIONS[op](*operands, evaluate=False)
        return FUNCTIONS[op].symbolic(*operands)

    def loaded(self, name: str, lane: Lane | None) -> sympy.Expr:
        if name in self.known:
            return self.known[name]
        kind = self.program.argument(name).kind
        text = f"{name}{self._place(lane, self.program.argument(name).columns)}"
        return sympy.Symbol(text, integer=True) if kind == "int" else sympy.Symbol(text, real=True)

    def _place(self, lane: Lane | None, columns: int | str | None) -> str:
        """``[0:4]``, ``[0:8:2]``: the columns of a lane, where it is not the whole tensor."""
        if lane is None or not isinstance(columns, int):
            return ""
        width = self.program.width(lane.axis)
        if (lane.offset, lane.stride, width) == (0, 1, columns):
            return ""
        end = lane.offset + lane.stride * (width or 1)
        return f"[{lane.offset}:{end}{f':{lane.stride}' if lane.stride != 1 else ''}]"

    def stored(self, output: Output) -> Iterator[sympy.Eq]:
        for value, lane in output.stores:
            expression = self.values[value]
            if output.sums_rows:
                expression = SumOverRows(expression)
            symbol = self.known.get(output.name, sympy.Symbol(f"{output.name}{self._place(lane, output.columns)}", real=True))
            if symbol != expression:
                yield sympy.Eq(symbol, expression, evaluate=False)


_WRITTEN = {
    "sum": SumOverColumns,
    "max": MaxOverColumns,
    "logsumexp": lambda x: sympy.log(SumOverColumns(sympy.exp(x))),
    "softplus": lambda x: sympy.log(1 + sympy.exp(x)),
    "log1p": lambda x: sympy.log(1 + x),
    "relu": lambda x: sympy.Max(0, x, evaluate=False),
    "abs": sympy.Abs,
    "sign": sympy.sign,
    **dict.fromkeys(("clamp_min", "maximum"), lambda a, b: sympy.Max(a, b, evaluate=False)),
    **dict.fromkeys(("clamp_max", "minimum"), lambda a, b: sympy.Min(a, b, evaluate=False)),
    "select": lambda condition, a, b: sympy.Piecewise((a, condition), (b, True), evaluate=False),
    "and": sympy.And,
    "or": sympy.Or,
    "not": sympy.Not,
}


class _PositiveFirst(Printer):
    """``x - u``, not ``-u + x``."""

    def _as_ordered_terms(self, expr: sympy.Add, order: str | None = None) -> list[sympy.Expr]:
        return sorted(super()._as_ordered_terms(expr, order=order), key=lambda term: term.could_extract_minus_sign())


class _Text(_PositiveFirst, StrPrinter):
    def _print_SumOverColumns(self, e: sympy.Expr) -> str:
        return f"sum_j({self._print(e.args[0])})"

    def _print_MaxOverColumns(self, e: sympy.Expr) -> str:
        return f"max_j({self._print(e.args[0])})"

    def _print_SumOverRows(self, e: sympy.Expr) -> str:
        return f"sum_rows({self._print(e.args[0])})"

    def _print_Float(self, e: sympy.Float) -> str:
        return f"{float(e):.7g}"

    def _print_Relational(self, e: sympy.Expr) -> str:
        return f"{self._print(e.lhs)} {e.rel_op} {self._print(e.rhs)}"

    def _print_Piecewise(self, e: sympy.Piecewise) -> str:
        (a, condition), (b, _) = e.args
        return f"({self._print(a)} if {self._print(condition)} else {self._print(b)})"


class _Latex(_PositiveFirst, LatexPrinter):
    def _print_Symbol(self, symbol: sympy.Symbol, style: str = "plain") -> str:
        r"""``d_x`` and ``g_y`` are :math:`\bar{x}`, :math:`\bar{y}`; ``gate`` is upright; ``x[0:4]``, ``r_1``, ``y1`` have indices."""
        name, _, lane = symbol.name.removesuffix("]").partition("[")
        bars = 0
        while name.startswith(("d_", "g_")):
            name, bars = name[2:], bars + 1
        letters = name.rstrip("0123456789").rstrip("_")
        number = name[len(letters):].lstrip("_")
        letters = letters.replace("_", r"\_")
        text = letters if len(letters) == 1 else rf"\mathrm{{{letters}}}"
        for _ in range(bars):
            text = rf"\bar{{{text}}}"
        index = ",".join(part for part in (number, lane) if part)
        return f"{text}_{{{index}}}" if index else text

    def _print_SumOverColumns(self, e: sympy.Expr, exp: str | None = None) -> str:
        return _raised(rf"\sum_j {self._in_brackets(e.args[0])}", exp)

    def _print_MaxOverColumns(self, e: sympy.Expr, exp: str | None = None) -> str:
        return _raised(rf"\max_j {self._in_brackets(e.args[0])}", exp)

    def _print_SumOverRows(self, e: sympy.Expr, exp: str | None = None) -> str:
        return _raised(rf"\sum_{{\mathrm{{rows}}}} {self._in_brackets(e.args[0])}", exp)

    def _print_Float(self, e: sympy.Float) -> str:
        mantissa, _, exponent = f"{float(e):.7g}".partition("e")
        if not exponent:
            return mantissa
        power = rf"10^{{{int(exponent)}}}"
        return power if mantissa == "1" else rf"{mantissa} \cdot {power}"

    def _in_brackets(self, e: sympy.Expr) -> str:
        return rf"\left({self._print(e)}\right)" if isinstance(e, sympy.Add) else self._print(e)


def _raised(text: str, exponent: str | None) -> str:
    return text if exponent is None else rf"\left({text}\right)^{{{exponent}}}"


def as_text(equation: sympy.Eq) -> str:
    printer = _Text()
    return f"{printer.doprint(equation.lhs)} = {printer.doprint(equation.rhs)}"


def as_latex(equation: sympy.Eq) -> str:
    printer = _Latex({"mul_symbol": r"\,"})
    return f"{printer.doprint(equation.lhs)} &= {printer.doprint(equation.rhs)}"
