"""The normal form of a row program: what it computes, whatever way it is spelled.

Each stored value becomes one sympy expression over what is loaded, and sympy orders, flattens and cancels. Erased on the way: casts,
the names of arguments, where lanes lie, stores that only copy, stores on the way to another. Kept apart by what they may vary over:

    F  a value of the whole domain     B  a column operand, broadcast over rows (a weight)     R  one number a row     I  integers
    k  a constant     W  the number of columns

Everything that is computed from column operands alone is one of them (``1 + w`` is a weight), a constant that multiplies one too.
``x / sqrt(m)``, ``x * m ** -0.5`` are the same Mul; ``softmax`` and ``exp(x - max) / sum(exp(x - max))`` both are
``exp(x) / RowSum(exp(x))`` (sympy cancels the maximum). Nothing is computed from these expressions, so they need not be stable.

Two forms are compared by ``skeleton`` first, a string equal for equal forms, then by ``unify``, which pairs up operands and constants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import sympy

from .derivation import exact
from .functions import FUNCTIONS, ClampMax, ClampMin, Relu, Select, Sigmoid, Softplus, compare
from .program import Node, Program

ZERO, ONE = sympy.Integer(0), sympy.Integer(1)
WIDTH = sympy.Symbol("W", positive=True)
IOTA = sympy.Symbol("iota", integer=True)
RELATIVE_TOLERANCE = 1e-3  # of constants: 0.7978845608 and 0.79788 are both sqrt(2 / pi)


class RowSum(sympy.Function):
    """The sum over a row's columns."""


class RowMax(sympy.Function):
    """The maximum over a row's columns."""


@dataclass(frozen=True)
class NormalForm:
    """The distinct results of a program.

    labels: the class of a symbol; constants: the number that a symbol k is; free: the symbols k that come of parameters.
    """

    outputs: tuple[sympy.Expr, ...]
    labels: Mapping[sympy.Symbol, str]
    constants: Mapping[sympy.Symbol, float]
    free: AbstractSet[sympy.Symbol] = frozenset()

    @cached_property
    def skeletons(self) -> tuple[str, ...]:
        return tuple(sorted(skeleton(e, self.labels) for e in self.outputs))


@lru_cache(maxsize=4096)
def normal_form(program: Program, varying: frozenset[str] = frozenset(), parameters: tuple[float, ...] = (),
                absent: tuple[tuple[str, int], ...] = ()) -> NormalForm:
    """The normal form of what a program stores.

    varying: column operands to be taken as varying over rows; parameters: constants that are to be ``free``; absent: operands
    with the number (0 or 1) that stands for them when they are missing.
    """
    return _Normalizer(program, varying, parameters, dict(absent)).form()


@dataclass
class _Normalizer:
    program: Program
    varying: frozenset[str]
    parameters: tuple[float, ...]
    absent: dict[str, int]
    free: set[sympy.Symbol] = field(default_factory=set)
    labels: dict[sympy.Symbol, str] = field(default_factory=dict)
    constants: dict[sympy.Symbol, float] = field(default_factory=dict)

    def form(self) -> NormalForm:
        values: list[sympy.Expr] = []
        for node in self.program.nodes:
            values.append(self.value(node, [values[v] for v in node.operands]))
        stored = dict.fromkeys(values[v] for output in self.program.outputs for v, _ in output.stores)
        # A store of a load is a copy (the columns that a rotary embedding leaves); of labels alone, a count of them.
        results = [e for e in stored if not e.is_Atom and {self.labels.get(s) for s in e.free_symbols} & {"F", "B", "R"}]
        # What is stored on the way to another result (a residual sum, a statistic) does not change what is computed.
        results = [e for e in results if not any(other != e and other.has(e) for other in results)]
        return NormalForm(tuple(results), self.labels, self.constants, frozenset(self.free))

    def value(self, node: Node, operands: list[sympy.Expr]) -> sympy.Expr:
        if node.op == "load":
            return self.loaded(*node.attributes)
        if node.op == "const":
            return self.constant(node.attributes[0])
        if node.op in ("cast", "real", "check_index", "stop"):
            return operands[-1]
        if node.op == "width":
            return WIDTH
        if node.op == "iota":
            return IOTA
        if node.op in _SPECIAL:
            return self.named(_SPECIAL[node.op](self, *operands))
        return self.named(FUNCTIONS[node.op].symbolic(*operands))

    def loaded(self, name: str, lane: object) -> sympy.Expr:
        if name in self.absent:
            return sympy.Integer(self.absent[name])
        argument = self.program.argument(name)
        symbol = sympy.Symbol(f"{name}@{lane}", real=True)
        whole = all(argument.rows) or name in self.varying
        self.labels[symbol] = "I" if argument.kind != "real" else "R" if lane is None else "F" if whole else "B"
        return symbol

    def constant(self, number: float) -> sympy.Expr:
        """0, 1, -1 are themselves, a number of columns is W, any other real is a symbol k with a sign; so is an integer."""
        if not isinstance(number, float):
            return self.labelled(f"i{number!r}", "k", number)
        if number in (0, 1, -1):
            return sympy.Integer(int(number))
        if any(abs(number - width) < 1e-6 * width for width in self.widths):
            return WIDTH
        if any(abs(number * width - 1) < 1e-6 for width in self.widths):
            return 1 / WIDTH
        symbol = self.labelled(f"k{abs(number):.12g}", "k", abs(number))
        if any(abs(known - value) < 1e-6 * abs(value) for value in self.parameters for known in (number, 1 / number, 1 - number)):
            self.free.add(symbol)
        return symbol if number > 0 else -symbol

    def folded(self, e: sympy.Expr) -> sympy.Expr:
        """An expression of numbers as one number, free if one of them is."""
        constant = self.constant(self.number(e))
        if e.free_symbols & self.free:
            self.free |= constant.free_symbols - {WIDTH}
        return constant

    @cached_property
    def widths(self) -> set[int]:
        """Static numbers of columns, where rows are reduced; tiny ones could be any number."""
        if not any(node.op == "sum" for node in self.program.nodes):
            return set()
        widths = {w for _, w in self.program.axes} | {a.columns for a in self.program.arguments}
        return {w for w in widths if isinstance(w, int) and w > 4}

    def labelled(self, name: str, label: str, number: float | None = None) -> sympy.Symbol:
        symbol = sympy.Symbol(name, positive=True) if label == "k" else sympy.Symbol(name, real=True)
        self.labels[symbol] = label
        if number is not None:
            self.constants[symbol] = number
        return symbol

    def label(self, e: sympy.Expr) -> str:
        """k: a number; B: computed from column operands; "": anything else."""
        labels = {"k" if s == WIDTH else self.labels.get(s, "") for s in e.free_symbols}
        if not labels:
            return "k"
        return "k" if labels == {"k"} and WIDTH not in e.free_symbols else "B" if labels <= {"k", "B"} and "B" in labels else ""

    def varies(self, e: sympy.Expr) -> bool:
        """Does an expression vary over columns?"""
        if isinstance(e, (RowSum, RowMax)):
            return False
        if isinstance(e, sympy.Symbol):
            return e == IOTA or self.labels.get(e) in ("F", "B")
        return any(self.varies(a) for a in e.args)

    def named(self, e: sympy.Expr) -> sympy.Expr:
        """Constants of a sum or product as one, column operands as one."""
        if e.is_Atom:
            return e
        if isinstance(e, (sympy.Mul, sympy.Add)):
            return self.grouped(e)
        if isinstance(e, sympy.Pow):
            return self.power(e.base, e.exp)
        return self.atom(e)

    def grouped(self, e: sympy.Expr) -> sympy.Expr:
        kind = type(e)
        signs = [a for a in e.args if a == -1] if kind is sympy.Mul else []
        rest = [a for a in e.args if a not in signs]
        columns = [a for a in rest if self.label(a) == "B"]
        numbers = [a for a in rest if self.label(a) == "k"]
        others = [a for a in rest if self.label(a) == ""]
        if kind is sympy.Mul:  # exp(a) * exp(b) = exp(a + b)
            exponents = [a.args[0] for a in others if isinstance(a, sympy.exp)]
            others = [a for a in others if not isinstance(a, sympy.exp)]
            others += [sympy.exp(sympy.Add(*exponents))] if exponents else []
        if columns:
            parts = [self.atom(kind(*columns, *numbers))]
        else:
            parts = [self.folded(kind(*numbers))] if numbers else []
        return kind(*signs, *parts, *others)

    def atom(self, e: sympy.Expr) -> sympy.Expr:
        """One symbol for what is computed from column operands alone, or from numbers alone."""
        label = self.label(e)
        if e.is_Atom or label == "":
            return e
        return self.folded(e) if label == "k" else self.labelled(f"({e})", "B")

    def number(self, e: sympy.Expr) -> float:
        return float(e.subs(self.constants))

    def power(self, base: sympy.Expr, exponent: sympy.Expr) -> sympy.Expr:
        """Powers of products factor by factor; 1 / (1 + exp(-x)) is a sigmoid."""
        if isinstance(base, sympy.Mul) and not exponent.is_integer:
            return self.named(sympy.Mul(*(self.power(factor, exponent) for factor in base.args)))
        if exponent == -1 and (inner := _one_plus_exp(base)) is not None:
            return Sigmoid(-inner)
        e = base**exponent
        return self.atom(e) if isinstance(e, sympy.Pow) else e if e.is_Atom else self.named(e)

    def divide(self, a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
        return a * self.power(b, sympy.Integer(-1))

    def raised(self, a: sympy.Expr, exponent: sympy.Expr) -> sympy.Expr:
        if self.label(exponent) == "k":
            return self.power(a, exact(self.number(exponent)))
        return a**exponent

    def log(self, x: sympy.Expr) -> sympy.Expr:
        """log(exp(a) * b) = a + log(b); log(1 + exp(a)) is a softplus."""
        if (inner := _one_plus_exp(x)) is not None:
            return Softplus(inner)
        exponents = [f.args[0] for f in sympy.Mul.make_args(x) if isinstance(f, sympy.exp)]
        rest = sympy.Mul(*(f for f in sympy.Mul.make_args(x) if not isinstance(f, sympy.exp)))
        return sympy.Add(*exponents, sympy.log(rest))

    def row_sum(self, x: sympy.Expr) -> sympy.Expr:
        """Factors that do not vary over columns stand outside."""
        inside: list[sympy.Expr] = []
        outside: list[sympy.Expr] = []
        for factor in sympy.Mul.make_args(x):
            if isinstance(factor, sympy.exp):
                for term in sympy.Add.make_args(factor.args[0]):
                    (inside if self.varies(term) else outside).append(sympy.exp(term))
            else:
                (inside if self.varies(factor) else outside).append(factor)
        return sympy.Mul(*outside) * (RowSum(sympy.Mul(*inside)) if inside else WIDTH)

    def logsumexp(self, x: sympy.Expr) -> sympy.Expr:
        return self.log(self.row_sum(sympy.exp(x)))

    def select(self, condition: sympy.Expr, a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
        """Constant factors stand outside of ``c ? x : 0``; ``x > 0 ? x : 0`` is a relu."""
        if a == 0 and {self.labels.get(s) for s in condition.free_symbols} == {"I"} and self.is_operand(b):
            return self.labelled(f"({condition}: {b})", "F")  # an operand with rows masked out
        if b != 0:
            return Select(condition, a, b)
        if condition == compare("lt", ZERO, a):
            return Relu(a)
        factors = sympy.Mul.make_args(a)
        outside = [f for f in factors if self.label(f) == "k" and a != f]
        return sympy.Mul(*outside) * Select(condition, sympy.Mul(*(f for f in factors if f not in outside)), ZERO)

    def is_operand(self, e: sympy.Expr) -> bool:
        """An operand, or one with a bias."""
        return all(self.labels.get(a) == "F" for a in sympy.Add.make_args(e))


def _one_plus_exp(e: sympy.Expr) -> sympy.Expr | None:
    """x, where the expression is 1 + exp(x)."""
    if isinstance(e, sympy.Add) and len(e.args) == 2 and ONE in e.args:
        other = next(a for a in e.args if a != ONE)
        return other.args[0] if isinstance(other, sympy.exp) else None
    return None


def _at_least(n: _Normalizer, a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    """A relu where the bound is 0; of two bounds the lower first, which is the same where they are in order."""
    if b == 0:
        return Relu(a)
    if isinstance(a, ClampMax) and n.label(a.args[1]) == n.label(b) == "k" and n.number(b) <= n.number(a.args[1]):
        return ClampMax(ClampMin(a.args[0], b), a.args[1])
    return ClampMin(a, b)


_SPECIAL: dict[str, Callable[..., sympy.Expr]] = {
    "div": _Normalizer.divide,
    "pow": _Normalizer.raised,
    "square": lambda n, x: n.power(x, sympy.Integer(2)),
    "reciprocal": lambda n, x: n.power(x, sympy.Integer(-1)),
    "sqrt": lambda n, x: n.power(x, sympy.Rational(1, 2)),
    "magnitude": lambda n, x: n.power(x, sympy.Rational(1, 2)),
    "rsqrt": lambda n, x: n.power(x, sympy.Rational(-1, 2)),
    "log": _Normalizer.log,
    "log1p": lambda n, x: n.log(1 + x),
    "sum": _Normalizer.row_sum,
    "max": lambda n, x: RowMax(x),
    "logsumexp": _Normalizer.logsumexp,
    "select": _Normalizer.select,
    "clamp_min": _at_least,
    "maximum": _at_least,
    "clamp_max": lambda n, a, b: ClampMax(a, b),
    "minimum": lambda n, a, b: ClampMax(a, b),
    "gt": lambda n, a, b: compare("lt", b, a),
    "ge": lambda n, a, b: compare("le", b, a),
}


def skeleton(e: sympy.Expr, labels: Mapping[sympy.Symbol, str]) -> str:
    """The expression as text with classes in place of operands and constants; operands of sums and products sorted."""
    if isinstance(e, sympy.Symbol):
        return labels.get(e, e.name)
    if e.is_Atom:
        return str(e)
    parts = [skeleton(a, labels) for a in e.args]
    if isinstance(e, (sympy.Add, sympy.Mul)):
        parts.sort()
    return f"{type(e).__name__}({','.join(parts)})"


Binding = dict[sympy.Symbol, sympy.Symbol]
# Decides whether a constant of the pattern may stand for that number.
Fits = Callable[[sympy.Symbol, float], bool]


def unify(pattern: NormalForm, form: NormalForm, fits: Fits) -> Iterator[Binding]:
    """The ways in which operands and constants of a pattern stand for those of another form of equal skeleton."""
    return _Unifier(pattern, form, fits).paired(list(pattern.outputs), list(form.outputs), {})


@dataclass
class _Unifier:
    pattern: NormalForm
    form: NormalForm
    fits: Fits

    def paired(self, left: list[sympy.Expr], right: list[sympy.Expr], binding: Binding) -> Iterator[Binding]:
        """Bindings that pair the expressions on the left with those on the right, in any order."""
        if not left:
            yield binding
            return
        wanted = skeleton(left[0], self.pattern.labels)
        for i, candidate in enumerate(right):
            if skeleton(candidate, self.form.labels) == wanted:
                for bound in self.one(left[0], candidate, binding):
                    yield from self.paired(left[1:], right[:i] + right[i + 1:], bound)

    def one(self, p: sympy.Expr, r: sympy.Expr, binding: Binding) -> Iterator[Binding]:
        if isinstance(p, sympy.Symbol):
            if self.stands_for(p, r, binding):
                yield {**binding, p: r}
        elif p.is_Atom:
            if p == r:
                yield binding
        elif isinstance(p, (sympy.Add, sympy.Mul)):
            yield from self.paired(list(p.args), list(r.args), binding)
        else:
            yield from self.in_order(p.args, r.args, binding)

    def in_order(self, left: Sequence[sympy.Expr], right: Sequence[sympy.Expr], binding: Binding) -> Iterator[Binding]:
        if not left:
            yield binding
            return
        for bound in self.one(left[0], right[0], binding):
            yield from self.in_order(left[1:], right[1:], bound)

    def stands_for(self, p: sympy.Symbol, r: sympy.Symbol, binding: Binding) -> bool:
        label = self.pattern.labels.get(p)
        if label is None:
            return p == r
        if label == "k":
            return binding.get(p, r) == r and self.fits(p, self.form.constants[r])
        others = {q for q, bound in binding.items() if bound == r and _argument(q) != _argument(p)}
        return binding.get(p, r) == r and not others


def _argument(symbol: sympy.Symbol) -> str:
    """The argument that a symbol is loaded from. Lanes of one may stand for the same value, arguments may not."""
    return symbol.name.partition("@")[0]
