"""The table of functions: derivatives against autograd, values against torch, lowering back from sympy."""

from __future__ import annotations

import inspect
import math

import pytest
import sympy
import torch

from fxfuse import functions
from fxfuse.algebra import Algebra
from fxfuse.derivation import RESULT, derive_backward, exact, local_derivative, operand_symbols
from fxfuse.functions import FUNCTION_OF_CLASS, FUNCTIONS
from fxfuse.program import Lane, Program, ProgramBuilder
from fxfuse.reference import execute

POSITIVE = {"sqrt", "magnitude", "rsqrt", "log", "log1p", "pow", "reciprocal"}
# The derivative of these is 0 by definition, and torch has none.
WITHOUT_AUTOGRAD = {"stop"}
REAL = [f for f in FUNCTIONS.values() if f.result in ("real", "same") and f.name not in ("select", "real", *WITHOUT_AUTOGRAD)]


def program_of(function: str) -> Program:
    """One operand of the whole domain for each argument."""
    b = ProgramBuilder(1)
    a = b.axis(None, "a")
    operands = [b.load(b.argument(f"x{i}", "float64", (True,), a), Lane(a)) for i in range(FUNCTIONS[function].arity)]
    b.output("y", "float64", (True,), a, ((b.apply(function, *operands), Lane(a)),))
    return b.build()


def inputs(function: str) -> list[torch.Tensor]:
    """Values away from singularities, ties and kinks; of both signs where that is allowed."""
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(3, 8, dtype=torch.float64, generator=generator) for _ in range(FUNCTIONS[function].arity)]
    if function in POSITIVE:
        values = [v.abs() + 0.1 for v in values]
    return [v.requires_grad_() for v in values]


@pytest.mark.parametrize("function", [f.name for f in REAL])
def test_derivative_agrees_with_autograd(function: str) -> None:
    program, operands = program_of(function), inputs(function)
    y, = execute(program, operands)
    g = torch.randn_like(y)
    expected = torch.autograd.grad(y, operands, g)
    wanted = tuple(f"x{i}" for i in range(len(operands)))
    backward = derive_backward(program, ("y",), wanted, None)
    named = {**dict(zip(wanted, operands, strict=True)), "g_y": g}
    got = execute(backward, [named[a.name] for a in backward.arguments])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("function", [f.name for f in REAL])
def test_the_derivative_is_a_value_again(function: str) -> None:
    """Whatever sympy makes of a derivative, the table can compute it."""
    for index in range(FUNCTIONS[function].arity):
        derivative = local_derivative(function, index)
        b = ProgramBuilder(1)
        a = b.axis(None, "a")
        symbols = (*operand_symbols(3), RESULT)
        values = {s: b.load(b.argument(s.name, "float64", (True,), a), Lane(a)) for s in symbols}
        Algebra(b).lower(derivative, values)


def test_derivatives_are_in_terms_of_the_result_where_that_is_stable() -> None:
    y, x = RESULT, operand_symbols(1)[0]
    assert local_derivative("rsqrt", 0) == -(y**3) / 2
    assert local_derivative("sqrt", 0) == 1 / (2 * y)
    assert local_derivative("exp", 0) == y
    assert local_derivative("sigmoid", 0) == y * (1 - y)
    assert local_derivative("tanh", 0) == 1 - y**2
    assert local_derivative("reciprocal", 0) == -(y**2)
    assert local_derivative("div", 1) == -y / operand_symbols(2)[1]
    assert local_derivative("square", 0) == 2 * x


def test_kinks_have_torchs_derivative() -> None:
    zero = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    for function, expected in (("relu", 0.0), ("abs", 0.0)):
        backward = derive_backward(program_of(function), ("y",), ("x0",), None)
        got, = execute(backward, [{"x0": zero, "g_y": torch.ones_like(zero)}[a.name] for a in backward.arguments])
        assert got.tolist() == [[expected] * 4]


def test_a_tie_is_shared() -> None:
    one = torch.ones(1, 4, dtype=torch.float64)
    for function in ("maximum", "minimum"):
        backward = derive_backward(program_of(function), ("y",), ("x0", "x1"), None)
        got = execute(backward, [one for _ in backward.arguments])
        assert [g.tolist() for g in got] == [[[0.5] * 4]] * 2


def test_a_choice_is_made_before_the_multiplication() -> None:
    """An infinite cotangent of what was not chosen does not turn into NaN."""
    backward = derive_backward(program_of("relu"), ("y",), ("x0",), None)
    named = {"x0": torch.tensor([[-1.0, 1.0]], dtype=torch.float64), "g_y": torch.full((1, 2), torch.inf, dtype=torch.float64)}
    got, = execute(backward, [named[a.name] for a in backward.arguments])
    assert got.tolist() == [[0.0, torch.inf]]


@pytest.mark.parametrize("function", ["relu", "maximum", "minimum"])
def test_a_cotangent_goes_where_torch_sends_it(function: str) -> None:
    """At ties, at zeros of both signs, at infinities and at NaN."""
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan], dtype=torch.float64)
    every = torch.cartesian_prod(*[values] * FUNCTIONS[function].arity).reshape(-1, FUNCTIONS[function].arity)
    operands = [column.clone().requires_grad_() for column in every.T]
    y = getattr(torch, function)(*operands)
    g = torch.linspace(1, 2, len(y), dtype=torch.float64)
    wanted = tuple(f"x{i}" for i in range(len(operands)))
    backward = derive_backward(program_of(function), ("y",), wanted, None)
    named = {**{name: x.detach()[None] for name, x in zip(wanted, operands, strict=True)}, "g_y": g[None], "y": y.detach()[None]}
    got = execute(backward, [named[a.name] for a in backward.arguments])
    for mine, torchs in zip(got, torch.autograd.grad(y, operands, g), strict=True):
        torch.testing.assert_close(mine[0], torchs, rtol=0, atol=0)


def test_every_class_that_derivatives_contain_has_a_function() -> None:
    classes = {c for _, c in inspect.getmembers(functions, inspect.isclass) if issubclass(c, sympy.Function)}
    lowered = {*FUNCTION_OF_CLASS, functions.Compare, functions.Logical, functions.Round, functions.Stop}
    assert classes <= lowered
    assert set(FUNCTION_OF_CLASS.values()) <= set(FUNCTIONS)


@pytest.mark.parametrize("number", [0.5, -1.5, 3.0, 1e-6, 0.044715, math.pi])
def test_constants_keep_their_value(number: float) -> None:
    assert float(exact(number)) == number


@pytest.mark.parametrize(("exponent", "expected"), [(3.0, "3*o0**2"), (0.5, "1/(2*y)"), (-0.5, "-y**3/2"), (2.0, "2*o0")])
def test_constant_exponents_are_exact(exponent: float, expected: str) -> None:
    assert str(local_derivative("pow", 0, exponent)) == expected
