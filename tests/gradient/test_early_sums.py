"""Sums along a row that need not wait for other sums are taken apart, and nothing else is."""

from __future__ import annotations

import pytest
import torch

from fxfuse import reference
from fxfuse.dataflow import Dataflow
from fxfuse.kernels.early_sums import with_early_sums
from fxfuse.program import Lane, Program, ProgramBuilder, parse
from fxfuse.validation import error_ratio
from tests.kernel_programs import BY_NAME


def walks(program: Program) -> int:
    """How many times a row is walked before everything is known."""
    flow = Dataflow(program)
    return max(flow.depth[v] for v in flow.live)


def built(expression) -> Program:
    """One output y of ``expression(builder, x)`` for an argument x with rows and columns."""
    b = ProgramBuilder(1)
    a = b.axis(None, "a")
    b.argument("x", "float32", (True,), a)
    value = expression(b, b.load("x", Lane(a)))
    b.output("y", "float32", (True,), a, ((value, Lane(a)),))
    return b.build()


def test_the_backward_of_a_layer_norm_walks_a_row_once() -> None:
    program = BY_NAME["layer_norm_backward"].program("float32")
    early = with_early_sums(program)
    assert (walks(program), walks(early)) == (2, 1)
    assert parse(str(early)) == early
    assert [len(sums) for sums in Dataflow(early).sums_together] == [3]


@pytest.mark.parametrize("name", sorted(set(BY_NAME) - {"layer_norm_backward"}))
def test_other_programs_stay_as_they_are(name: str) -> None:
    program = BY_NAME[name].program("bfloat16")
    assert with_early_sums(program) is program


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_values_are_as_right_as_before(scale: float) -> None:
    case = BY_NAME["layer_norm_backward"]
    program = case.program("float32")
    tensors = case.inputs(program, (64,), 300, scale)
    early = reference.execute(with_early_sums(program), tensors)
    before = reference.execute(program, tensors)
    exact = reference.execute(program.retyped({a.name: "float64" for a in program.arguments}), [t.double() for t in tensors])
    for ours, theirs, truth in zip(early, before, exact, strict=True):
        assert error_ratio(ours, theirs, truth) < 1.5


def test_terms_of_every_sign_add_up() -> None:
    """sum(-(m x - x^2) + x) with m = sum(x): three terms, one of them scaled."""

    def expression(b: ProgramBuilder, x: int) -> int:
        m = b.reduce("sum", "a", x)
        inner = b.apply("neg", b.apply("sub", b.apply("mul", m, x), b.apply("square", x)))
        return b.apply("mul", x, b.reduce("sum", "a", b.apply("add", inner, x)))

    program = built(expression)
    early = with_early_sums(program)
    assert (walks(program), walks(early)) == (2, 1)
    x = [torch.randn(5, 12, dtype=torch.float64).float()]
    torch.testing.assert_close(reference.execute(early, x), reference.execute(program, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spoil", ["square", "row", "exp"])
def test_what_is_not_linear_in_the_late_sum_waits(spoil: str) -> None:
    """A variance; a difference from the mean alone, whose sum would cancel; a function of the late value."""

    def expression(b: ProgramBuilder, x: int) -> int:
        late = b.apply("sub", x, b.apply("div", b.reduce("sum", "a", x), b.width("a")))
        value = late if spoil == "row" else b.apply(spoil, late)
        return b.apply("mul", x, b.reduce("sum", "a", value))

    program = built(expression)
    assert with_early_sums(program) is program
