"""Sums of several lanes of a row that are only added up become one sum, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fxfuse import reference
from fxfuse.dataflow import Dataflow
from fxfuse.kernels.catalogue import contiguous_schedule, emit
from fxfuse.kernels.joined_sums import with_joined_sums
from fxfuse.program import Lane, Program, ProgramBuilder, parse
from fxfuse.validation import error_ratio
from tests.kernel_programs import CASES

Statistic = Callable[[ProgramBuilder, str, int, int], int]


def sum_of_squares(b: ProgramBuilder, axis: str, one: int, two: int) -> int:
    return b.apply("add", *(b.reduce("sum", axis, b.apply("square", half)) for half in (one, two)))


def head(statistic: Statistic = sum_of_squares, half: int = 64) -> Program:
    """Both halves of a head over the root of the mean of ``statistic`` of them."""
    b = ProgramBuilder(1)
    a = b.axis(half, "a")
    b.argument("x", "float32", (True,), 2 * half)
    one, two = b.load("x", Lane(a)), b.load("x", Lane(a, half))
    width = b.apply("add", b.width(a), b.width(a))
    scale = b.apply("rsqrt", b.apply("div", statistic(b, a, one, two), width))
    b.output("y", "float32", (True,), 2 * half, ((b.apply("mul", one, scale), Lane(a)), (b.apply("mul", two, scale), Lane(a, half))))
    return b.build()


def sums(program: Program) -> int:
    flow = Dataflow(program)
    return sum(flow.is_reduction(v) for v in flow.live)


def test_a_head_is_summed_once() -> None:
    joined = with_joined_sums(head())
    assert (sums(head()), sums(joined)) == (2, 1)
    assert parse(str(joined)) == joined


def test_sums_of_three_are_one() -> None:
    def three(b: ProgramBuilder, axis: str, one: int, two: int) -> int:
        return b.apply("add", sum_of_squares(b, axis, one, two), b.reduce("sum", axis, b.apply("abs", one)))

    assert (sums(head(three)), sums(with_joined_sums(head(three)))) == (3, 1)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_values_are_as_right_as_before(scale: float) -> None:
    torch.manual_seed(0)
    program, x = head(), scale * torch.randn(64, 128)
    exact, = reference.execute(program.retyped({"x": "float64"}), [x.double()])
    ours, = reference.execute(with_joined_sums(program), [x])
    before, = reference.execute(program, [x])
    assert error_ratio(ours, before, exact) < 1.5


def read_elsewhere(b: ProgramBuilder, axis: str, one: int, two: int) -> int:
    total = b.reduce("sum", axis, b.apply("square", one))
    return b.apply("add", b.apply("add", total, b.reduce("sum", axis, b.apply("square", two))), b.apply("sqrt", total))


def of_two_walks(b: ProgramBuilder, axis: str, one: int, two: int) -> int:
    first = b.reduce("sum", axis, one)
    return b.apply("add", first, b.reduce("sum", axis, b.apply("square", b.apply("sub", two, b.reduce("max", axis, two)))))


def with_itself(b: ProgramBuilder, axis: str, one: int, two: int) -> int:
    total = b.reduce("sum", axis, b.apply("square", one))
    return b.apply("add", total, total)


@pytest.mark.parametrize("statistic", [read_elsewhere, of_two_walks, with_itself])
def test_near_misses_stay_as_they_are(statistic: Statistic) -> None:
    program = head(statistic)
    assert with_joined_sums(program) is program


@pytest.mark.parametrize("case", [case for case in CASES if "normed_rotary" not in case.name], ids=lambda case: case.name)
def test_programs_of_one_lane_stay_as_they_are(case) -> None:
    program = case.program("bfloat16")
    assert sums(with_joined_sums(program)) == sums(program)


def test_a_mean_over_both_halves_of_a_head_is_no_division() -> None:
    """Their widths add up to a power of 2 that the program fixes; other sums stay divisions, rounded to nearest."""
    assert "* 0.0078125" in emit(head(), contiguous_schedule(head()))
    assert "divide(" not in emit(head(), contiguous_schedule(head()))
    uneven = head(half=48)
    assert "device.divide(v" in emit(uneven, contiguous_schedule(uneven))
