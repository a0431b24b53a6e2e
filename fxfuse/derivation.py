"""Reverse-mode derivation of a row program: three rules, one driver.

For every value v with an adjoint g (the cotangent that has arrived at it), from the last value to the first:

    pointwise   y = f(a, b)               a += g * df/da            df/da by sympy, in terms of a, b and y
    reduction   s = sum_j x_j             x_j += g
                m = max_j x_j             x_j += g / (number of ties)   where x_j = m, else 0
                l = logsumexp_j x_j       x_j += g * exp(x_j - l)
    transpose   a value that is repeated over columns gathers a sum over columns; one that is repeated over rows,
                a sum over rows, taken where its gradient is stored (``Output.rows``).

The backward is written in the same representation as the forward, as one program with it; so what the forward has computed is
found again instead of being built twice, values that the forward saved are read instead of recomputed, and the derivative of
a derivative needs nothing new.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache

import sympy

from .algebra import Algebra, append_node
from .errors import DerivationError
from .functions import FUNCTIONS
from .program import REAL_DTYPES, REDUCTIONS, Argument, Lane, Node, Output, Program, ProgramBuilder

RESULT = sympy.Symbol("y", real=True)


def cotangent_name(output: str) -> str:
    return f"g_{output}"


def gradient_name(argument: str, taken: Iterable[str] = ()) -> str:
    """``d_<argument>``; ``dd_<argument>`` where ``g_d_<argument>`` is an argument already: in a second derivative."""
    name = f"d_{argument}"
    while cotangent_name(name) in taken:
        name = f"d{name}"
    return name


@lru_cache(maxsize=512)
def derive_backward(program: Program, cotangents: tuple[str, ...], wanted: tuple[str, ...],
                    saved: tuple[str, ...] | None = None) -> Program:
    """The program that takes cotangents of outputs to gradients of arguments.

    cotangents: the outputs that have one; it is the argument ``g_<output>``, shaped and typed as the output.
    wanted:     the arguments whose gradient is wanted; it is the output ``d_<argument>``, in this order, shaped and
                typed as the argument.
    saved:      the forward outputs that may be read, as arguments under their own names, instead of being
                recomputed (names of arguments, which may always be read, are allowed too).

    Arguments: those of the forward that are read, then the saved outputs that are read, then the cotangents that are.
    """
    joint = _Joint(program, cotangents, wanted)
    return _backward_part(program, joint.builder, _saved_values(program, saved or (), joint.values))


@lru_cache(maxsize=512)
def values_read(program: Program, cotangents: tuple[str, ...], wanted: tuple[str, ...]) -> frozenset[int]:
    """The forward values that the arithmetic of the backward uses, loads among them, before any is saved or recomputed."""
    joint = _Joint(program, cotangents, wanted)
    forward_values = {number: value for value, number in enumerate(joint.values)}
    pending = {value for output in joint.builder.outputs for value, _ in output.stores}
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        seen.add(value)
        if value not in forward_values:
            pending.update(set(joint.builder.nodes[value].operands) - seen)
    return frozenset(forward_values[value] for value in seen if value in forward_values)


@lru_cache(maxsize=1024)
def local_derivative(function: str, index: int, exponent: float | None = None) -> sympy.Expr:
    """df/d(operand ``index``) in terms of the operands o0, o1, ... and the result y.

    In terms of the result wherever sympy finds it: ``rsqrt' = -y**3 / 2``, ``exp' = y``; it is there already, and it stays in
    range where a rebuilt expression would not. ``exponent`` is that of a power, where it is a constant.
    """
    operands: list[sympy.Expr] = list(operand_symbols(FUNCTIONS[function].arity))
    if exponent is not None:
        operands[1] = exact(exponent)
    result = FUNCTIONS[function].symbolic(*operands)
    derivative = sympy.diff(result, operands[index])
    if function == "pow" and exponent is None and index == 0:
        return sympy.powsimp(derivative)  # b * a**(b - 1), which is right at a = 0, where b * y / a is not
    return derivative.subs(result, RESULT)


def operand_symbols(count: int) -> tuple[sympy.Symbol, ...]:
    return tuple(sympy.Symbol(f"o{i}", real=True) for i in range(count))


def exact(number: float) -> sympy.Expr:
    """A constant as sympy's own: halves and integers exactly, so that powers meet in ``x**(-1/2)``."""
    return sympy.Rational(int(2 * number), 2) if float(2 * number).is_integer() else sympy.Float(number)


class _Joint:
    """Forward and backward as one program being built. ``values`` maps a forward value to its number in it."""

    def __init__(self, program: Program, cotangents: tuple[str, ...], wanted: tuple[str, ...]) -> None:
        self.program = program
        self.builder = ProgramBuilder(program.rank, program.math, dict(program.axes), list(program.arguments))
        self.algebra = Algebra(self.builder)
        self.values: list[int] = []
        for node in program.nodes:
            self.values.append(append_node(self.builder, node, [self.values[v] for v in node.operands]))
            self.algebra.remember(self.values[-1])
        self.adjoints: dict[int, int] = {}
        self.active = _active(program, wanted)
        for name in cotangents:
            self.add_cotangent(_output(program, name))
        self.sweep()
        for name in wanted:
            self.add_gradient(program.argument(name))

    def accumulate(self, value: int, contribution: int | None) -> None:
        if contribution is None or not self.active[value]:
            return
        before = self.adjoints.get(value)
        self.adjoints[value] = contribution if before is None else self.algebra.add(before, contribution)

    def add_cotangent(self, output: Output) -> None:
        if output.dtype not in REAL_DTYPES:
            raise DerivationError(f"output {output.name}: a {output.dtype} has no cotangent; leave it out")
        name = self.builder.argument(cotangent_name(output.name), output.dtype, output.rows, output.columns)
        for value, lane in output.stores:
            arrived = self.builder.load(name, lane)
            if lane is not None and self.program.extents[value].axis is None:
                arrived = self.algebra.sum(lane.axis, arrived)
            self.accumulate(value, arrived)

    def sweep(self) -> None:
        for value in reversed(range(len(self.program.nodes))):
            if value in self.adjoints:
                self._transpose(value, self.program.nodes[value], self.adjoints[value])

    def _transpose(self, value: int, node: Node, g: int) -> None:
        if node.op in FUNCTIONS:
            self._pointwise(value, node, g)
        elif node.op == "cast":  # rounding is not differentiated
            self.accumulate(node.operands[0], g)
        elif node.op in REDUCTIONS:
            self.accumulate(node.operands[0], self._reduction(value, node, g))

    def _pointwise(self, value: int, node: Node, g: int) -> None:
        """a += g * df/da, summed over the columns that f has and a has not."""
        symbols = operand_symbols(len(node.operands))
        known = {symbol: self.values[v] for symbol, v in zip(symbols, node.operands, strict=True)}
        known[RESULT] = self.values[value]
        exponent = self.algebra.constant(self.values[node.operands[1]]) if node.op == "pow" else None
        for index, operand in enumerate(node.operands):
            if not self.active[operand]:
                continue
            axis = self.program.extents[value].axis if self.program.extents[operand].axis is None else None
            derivative = local_derivative(node.op, index, exponent)
            self.accumulate(operand, self.algebra.times(g, derivative, known, over=axis))

    def _reduction(self, value: int, node: Node, g: int) -> int:
        algebra, axis = self.algebra, node.attributes[0]
        if node.op == "sum":
            return g
        x, result = self.values[node.operands[0]], self.values[value]
        if node.op == "logsumexp":
            return algebra.mul(g, algebra.apply("exp", algebra.apply("sub", x, result)))
        zero, one = self.builder.const(0.0), self.builder.const(1.0)
        is_max = algebra.apply("eq", x, result)
        ties = algebra.sum(axis, algebra.select(is_max, one, zero))
        return algebra.select(is_max, algebra.div(g, ties), zero)

    def add_gradient(self, argument: Argument) -> None:
        """Store the adjoints of what was loaded, and zeros in the columns that were not, or got no cotangent."""
        if argument.kind != "real":
            raise DerivationError(f"argument {argument.name}: a {argument.dtype} has no gradient; leave it out of `wanted`")
        stores: list[tuple[int, Lane | None]] = []
        for loaded in self.program.loads(argument.name):
            lane = self.program.nodes[loaded].attributes[1]
            stores.append((self.adjoints.get(loaded, self.builder.const(0.0)), lane))
        stores.extend((self.builder.const(0.0), lane) for lane in self._unread_lanes(argument, [s[1] for s in stores]))
        name = gradient_name(argument.name, {a.name for a in self.builder.arguments})
        self.builder.output(name, argument.dtype, argument.rows, argument.columns, tuple(stores))

    def _unread_lanes(self, argument: Argument, lanes: list[Lane | None]) -> Iterable[Lane | None]:
        if not isinstance(argument.columns, int):
            whole = None if argument.columns is None else Lane(argument.columns)
            return [] if lanes else [whole]
        unread = set(range(argument.columns))
        for lane in lanes:
            assert lane is not None
            width = self.builder.axes[lane.axis] or 0
            unread -= set(range(lane.offset, lane.offset + lane.stride * width, lane.stride))
        return [Lane(self._axis_of_width(width), offset, stride) for offset, stride, width in _progressions(unread)]

    def _axis_of_width(self, width: int) -> str:
        for name, known in self.builder.axes.items():
            if known == width:
                return name
        fresh = next(f"z{i}" for i in range(len(self.builder.axes) + 1) if f"z{i}" not in self.builder.axes)
        return self.builder.axis(width, fresh)


def _progressions(columns: set[int]) -> list[tuple[int, int, int]]:
    """Columns as few arithmetic progressions (offset, stride, count), greedily."""
    left, found = sorted(columns), []
    while left:
        members = set(left)
        stride = left[1] - left[0] if len(left) > 1 else 1
        count = 1
        while left[0] + stride * count in members:
            count += 1
        found.append((left[0], stride, count))
        members -= set(range(left[0], left[0] + stride * count, stride))
        left = sorted(members)
    return found


def _active(program: Program, wanted: tuple[str, ...]) -> list[bool]:
    """Does a value depend, through real values, on an argument whose gradient is wanted?"""
    active: list[bool] = []
    for i, node in enumerate(program.nodes):
        real = program.kinds[i] == "real"
        wants = node.op == "load" and node.attributes[0] in wanted
        active.append(real and (wants or any(active[v] for v in node.operands)))
    return active


def _output(program: Program, name: str) -> Output:
    for output in program.outputs:
        if output.name == name:
            return output
    raise DerivationError(f"no output {name!r}; the program has {', '.join(o.name for o in program.outputs)}")


def _saved_values(program: Program, saved: tuple[str, ...], values: list[int]) -> dict[int, tuple[Output, Lane | None]]:
    """Which joint values can be read from which saved output (of low precision: as stored, which is what eager saves)."""
    readable: dict[int, tuple[Output, Lane | None]] = {}
    for name in saved:
        if name in program.argument_index:
            continue
        output = _output(program, name)
        for value, lane in output.stores:
            narrower = lane is not None and program.extents[value].axis is None
            if not output.sums_rows and not narrower and program.nodes[value].op not in ("load", "const"):
                readable.setdefault(values[value], (output, lane))
    return readable


def _backward_part(forward: Program, joint: ProgramBuilder, readable: dict[int, tuple[Output, Lane | None]]) -> Program:
    """The values that the gradients need, saved ones read instead of computed."""
    needed = {value for output in joint.outputs for value, _ in output.stores}
    for value in reversed(range(len(joint.nodes))):
        if value in needed and value not in readable:
            needed.update(joint.nodes[value].operands)
    cotangents = joint.arguments[len(forward.arguments):]
    outputs = {output.name: Argument(output.name, output.dtype, output.rows, output.columns)
               for output, _ in readable.values()}
    builder = ProgramBuilder(joint.rank, joint.math, dict(joint.axes), [*forward.arguments, *outputs.values(), *cotangents])
    renumbered: dict[int, int] = {}
    for value in sorted(needed):
        if value in readable:
            output, lane = readable[value]
            renumbered[value] = builder.load(output.name, lane)
        else:
            node = joint.nodes[value]
            operands = [renumbered[v] for v in node.operands]
            # The forward has checked its indices.
            renumbered[value] = operands[0] if node.op == "check_index" else append_node(builder, node, operands)
    for out in joint.outputs:
        stores = tuple((renumbered[value], lane) for value, lane in out.stores)
        builder.output(out.name, out.dtype, out.rows, out.columns, stores)
    return _with_domain(builder.build(), forward, builder.arguments)


def _with_domain(backward: Program, forward: Program, candidates: list[Argument]) -> Program:
    """Keep an argument that no value reads, where the sizes of the domain could not be told without it."""
    kept = {argument.name for argument in backward.arguments}

    def keep(known: bool, matching: list[Argument]) -> None:
        if not known and matching:
            kept.add(matching[0].name)

    for d in range(forward.rank):
        varying = [a for a in candidates if a.rows[d]]
        if any(a.rows[d] for a in forward.arguments):
            keep(any(a.name in kept for a in varying), varying)
    for axis, width in backward.axes:
        covering = [a for a in candidates if a.columns == axis]
        keep(width is not None or any(a.name in kept for a in covering), covering)
    keep(bool(kept), candidates)
    arguments = tuple(a for a in candidates if a.name in kept)
    axes = {**{a.columns: None for a in arguments if isinstance(a.columns, str)}, **dict(backward.axes)}
    known_widths = dict(forward.axes)
    ordered = tuple((name, known_widths.get(name, width)) for name, width in axes.items())
    return replace(backward, arguments=arguments, axes=ordered if len(axes) > len(backward.axes) else backward.axes).verify()
