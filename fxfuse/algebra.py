"""Sympy expressions written back as values of a row program.

A derivative is found by sympy and computed by the program, so it has to come back as values. What is free to simplify is
simplified on the way (``1 * x``, ``x + (-y)``, a value that exists already); nothing is expanded, and ``sympy.simplify`` is never
called. Factors are multiplied from the narrowest extent to the widest, so that what does not vary over columns is computed once
a row, and what does not vary over the summed axis stays outside its sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import sympy

from .errors import DerivationError
from .functions import FUNCTION_OF_CLASS, Compare, Logical, Round, Select
from .program import REDUCTIONS, Extent, Node, ProgramBuilder

COMMUTATIVE = ("add", "mul", "maximum", "minimum", "eq", "ne", "and", "or")

Values = Mapping[sympy.Symbol, int]


def append_node(builder: ProgramBuilder, node: Node, operands: Sequence[int]) -> int:
    """``node`` over other operands, appended to a program that is being built."""
    if node.op == "load":
        return builder.load(*node.attributes)
    if node.op == "const":
        return builder.const(*node.attributes)
    if node.op == "cast":
        return builder.cast(node.attributes[0], operands[0])
    if node.op in REDUCTIONS:
        return builder.reduce(node.op, node.attributes[0], operands[0])
    if node.op == "width":
        return builder.width(node.attributes[0])
    if node.op == "iota":
        return builder.iota(node.attributes[0])
    if node.op == "check_index":
        return builder.check_index(node.attributes[0], operands[0])
    return builder.apply(node.op, *operands)


@dataclass
class Algebra:
    """Arithmetic on the values of a program that is being built."""

    builder: ProgramBuilder
    _extents: list[Extent] = field(default_factory=list)
    _commuted: dict[tuple[str, tuple[int, ...]], int] = field(default_factory=dict)

    def extent(self, value: int) -> Extent:
        for node in self.builder.nodes[len(self._extents):]:
            self._extents.append(self._extent_of(node))
        return self._extents[value]

    def _extent_of(self, node: Node) -> Extent:
        if node.op == "load":
            name, lane = node.attributes
            rows = next(a.rows for a in self.builder.arguments if a.name == name)
            return Extent(any(rows), None if lane is None else lane.axis)
        if node.op == "iota":
            return Extent(False, node.attributes[0])
        joined = Extent(False, None)
        for operand in node.operands:
            joined = joined.join(self._extents[operand])
        return Extent(joined.row, None) if node.op in REDUCTIONS else joined

    def constant(self, value: int) -> float | None:
        """The number that a value is, if it is a real constant."""
        node = self.builder.nodes[value]
        return node.attributes[0] if node.op == "const" and isinstance(node.attributes[0], float) else None

    def apply(self, function: str, *operands: int) -> int:
        """A table function; finds a value that exists already, also with its operands swapped."""
        if function not in COMMUTATIVE:
            return self.builder.apply(function, *operands)
        key = function, tuple(sorted(operands))
        if key not in self._commuted:
            self._commuted[key] = self.builder.apply(function, *operands)
        return self._commuted[key]

    def remember(self, value: int) -> None:
        """Let ``apply`` find a value that was added to the builder directly."""
        node = self.builder.nodes[value]
        if node.op in COMMUTATIVE:
            self._commuted.setdefault((node.op, tuple(sorted(node.operands))), value)

    def neg(self, a: int) -> int:
        node = self.builder.nodes[a]
        if node.op == "neg":  # -(-x) -> x
            return node.operands[0]
        if (number := self.constant(a)) is not None:
            return self.builder.const(-number)
        return self.apply("neg", a)

    def add(self, a: int, b: int) -> int:
        numbers = self.constant(a), self.constant(b)
        if numbers[0] is not None and numbers[1] is not None:
            return self.builder.const(numbers[0] + numbers[1])
        if numbers[0] == 0.0:  # 0 + x -> x
            return b
        if numbers[1] == 0.0:
            return a
        if (denominator := self._common_denominator(a, b)) is not None:  # x / s + y / s -> (x + y) / s
            return self.div(self.add(self._numerator(a), self._numerator(b)), denominator)
        if self.builder.nodes[b].op == "neg":  # x + (-y) -> x - y
            return self.apply("sub", a, self.neg(b))
        if self.builder.nodes[a].op == "neg":
            return self.apply("sub", b, self.neg(a))
        return self.apply("add", a, b)

    def mul(self, a: int, b: int) -> int:
        numbers = self.constant(a), self.constant(b)
        if numbers[0] is not None and numbers[1] is not None:
            return self.builder.const(numbers[0] * numbers[1])
        for number, other in zip(numbers, (b, a), strict=True):
            if number == 1.0:  # 1 * x -> x
                return other
            if number == -1.0:
                return self.neg(other)
        if self.builder.nodes[a].op == "neg" or self.builder.nodes[b].op == "neg":  # signs move outwards
            negative = (self.builder.nodes[a].op == "neg") != (self.builder.nodes[b].op == "neg")
            product = self.mul(self._unsigned(a), self._unsigned(b))
            return self.neg(product) if negative else product
        for quotient, other in ((a, b), (b, a)):  # (x / s) * e -> x * (e / s), where e / s is known already (a softmax's output)
            node = self.builder.nodes[quotient]
            known = self.builder.find(Node("div", (other, node.operands[1]))) if node.op == "div" else None
            if known is not None and known < quotient:
                return self.apply("mul", node.operands[0], known)
        return self.apply("square", a) if a == b else self.apply("mul", a, b)

    def _common_denominator(self, a: int, b: int) -> int | None:
        """s, where the values are x / s and y / s (or their negatives)."""
        nodes = [self.builder.nodes[self._unsigned(v)] for v in (a, b)]
        if any(node.op != "div" for node in nodes) or nodes[0].operands[1] != nodes[1].operands[1]:
            return None
        return nodes[0].operands[1]

    def _numerator(self, quotient: int) -> int:
        numerator = self.builder.nodes[self._unsigned(quotient)].operands[0]
        return self.neg(numerator) if self.builder.nodes[quotient].op == "neg" else numerator

    def div(self, a: int, b: int) -> int:
        if self.constant(a) == 1.0:
            return self.apply("reciprocal", b)
        if self.constant(b) == 1.0:
            return a
        if self.builder.nodes[a].op == "neg":
            return self.neg(self.div(self._unsigned(a), b))
        return self.apply("div", a, b)

    def select(self, condition: int, a: int, b: int) -> int:
        return a if a == b else self.apply("select", condition, a, b)

    def sum(self, axis: str, value: int) -> int:
        """The sum over the columns of an axis, also of a value that does not vary over it."""
        if self.extent(value).axis is None:
            return self.mul(self.builder.width(axis), value)
        if self.builder.nodes[value].op == "neg":
            return self.neg(self.builder.reduce("sum", axis, self._unsigned(value)))
        return self.builder.reduce("sum", axis, value)

    def _unsigned(self, value: int) -> int:
        node = self.builder.nodes[value]
        return node.operands[0] if node.op == "neg" else value

    def times(self, cotangent: int, derivative: sympy.Expr, values: Values, over: str | None = None) -> int | None:
        """``cotangent * derivative``, summed over the axis ``over``; None where the derivative is 0.

        A choice is made before the multiplication: ``c * select(p, 1, 0)`` becomes ``select(p, c, 0)``, which is 0 even where
        the cotangent is not finite.
        """
        if derivative == 0:
            return None
        if isinstance(derivative, Select):
            condition, *branches = derivative.args
            terms = [self.times(cotangent, branch, values) for branch in branches]
            zero = self.builder.const(0.0)
            chosen = self.select(self.lower(condition, values), *(zero if t is None else t for t in terms))
            return chosen if over is None else self.sum(over, chosen)
        g = sympy.Dummy("g")
        return self._product([g, *sympy.Mul.make_args(derivative)], {**values, g: cotangent}, over)

    def lower(self, expression: sympy.Expr, values: Values) -> int:
        """The value of an expression over symbols whose values are known."""
        if isinstance(expression, sympy.Symbol):
            return values[expression]
        if expression.is_number:
            return self.builder.const(float(expression))
        if isinstance(expression, sympy.Add):
            total, *rest = [self.lower(term, values) for term in expression.as_ordered_terms()]
            for term in rest:
                total = self.add(total, term)
            return total
        if isinstance(expression, sympy.Mul):
            return self._product(list(expression.args), values, None)
        if isinstance(expression, sympy.Pow):
            return self._power(expression, values)
        if isinstance(expression, (Compare, Logical)):
            return self.apply(expression.args[0].name, *(self.lower(a, values) for a in expression.args[1:]))
        if isinstance(expression, Round):
            return self.builder.cast(expression.args[0].name, self.lower(expression.args[1], values))
        if type(expression) in FUNCTION_OF_CLASS:
            return self.apply(FUNCTION_OF_CLASS[type(expression)], *(self.lower(a, values) for a in expression.args))
        raise DerivationError(f"derivative: {type(expression).__name__} has no function in the table; "
                              f"add it to the table in functions.py")

    def _product(self, factors: list[sympy.Expr], values: Values, over: str | None) -> int:
        """The product of factors, negative powers as divisions, summed over an axis."""
        sign, number = 1, 1.0
        numerators: list[int] = []
        denominators: list[int] = []
        for factor in sorted(factors, key=sympy.default_sort_key):
            if factor.is_number:
                number *= float(factor)
            elif isinstance(factor, sympy.Pow) and factor.exp.is_integer and factor.exp.is_negative:
                denominators.append(self.lower(factor.base ** -factor.exp, values))
            else:
                numerators.append(self.lower(factor, values))
        if number < 0:
            sign, number = -1, -number
        constants = [] if number == 1.0 else [self.builder.const(number)]
        inside = [v for v in numerators if over is not None and self.extent(v).axis is not None]
        below = [v for v in denominators if over is not None and self.extent(v).axis is not None]
        outside = [v for v in numerators if v not in inside]
        if over is not None:
            if inside or below:
                outside.append(self.sum(over, self._quotient(inside, below)))
            else:
                outside.append(self.builder.width(over))
        product = self._quotient(constants + outside, [v for v in denominators if v not in below])
        return self.neg(product) if sign < 0 else product

    def _quotient(self, numerators: list[int], denominators: list[int]) -> int:
        """Numerators over denominators: first what does not vary over columns, then what does."""
        narrow = sorted((v for v in numerators if self.extent(v).axis is None), key=lambda v: self.extent(v).row)
        below = [v for v in denominators if narrow and self.extent(v).axis is None]
        wide = [v for v in numerators if v not in narrow]
        total: int | None = None
        for factors, divisors in ((narrow, below), (wide, [v for v in denominators if v not in below])):
            for value in factors:
                total = value if total is None else self.mul(total, value)
            for value in divisors:
                total = self.div(self.builder.const(1.0) if total is None else total, value)
        return self.builder.const(1.0) if total is None else total

    def _power(self, power: sympy.Pow, values: Values) -> int:
        base, exponent = self.lower(power.base, values), power.exp
        if exponent.is_Integer and abs(exponent) <= 8:
            positive = self._repeated(base, abs(int(exponent)))
            return positive if exponent > 0 else self.apply("reciprocal", positive)
        if exponent == sympy.Rational(1, 2):
            return self.apply("sqrt", base)
        if exponent == sympy.Rational(-1, 2):
            return self.apply("rsqrt", base)
        return self.apply("pow", base, self.lower(exponent, values))

    def _repeated(self, base: int, exponent: int) -> int:
        """``base ** exponent`` for a small positive integer, by squaring."""
        if exponent == 1:
            return base
        half = self._repeated(base, exponent // 2)
        squared = self.apply("square", half)
        return self.mul(squared, base) if exponent % 2 else squared


