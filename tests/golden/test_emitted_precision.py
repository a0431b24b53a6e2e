"""Where the last bits of a float32 value are rounded away in the end, the emitted kernel computes it by the hardware's function."""

from __future__ import annotations

import pytest

from fxfuse.kernels.catalogue import contiguous_schedule, emit
from fxfuse.program import Lane, Program, ProgramBuilder


def exponential(stored: str, beside: str = "", math: str = "float32") -> Program:
    """exp(x) / n of a row, stored in a type; ``beside``: and its sum in the math type ("sum"), or that of what was stored ("rounded").
    """
    b = ProgramBuilder(1, math)
    a = b.axis(None, "a")
    b.argument("x", stored, (True,), a)
    b.argument("n", math, (True,), None)
    value = b.apply("div", b.apply("exp", b.load("x", Lane(a))), b.load("n", None))
    rounded = b.cast(stored, value)
    b.output("y", stored, (True,), a, ((rounded, Lane(a)),))
    if beside:
        b.output("total", math, (True,), None, ((b.reduce("sum", a, value if beside == "sum" else rounded), None),))
    return b.build()


def source(program: Program) -> str:
    return emit(program, contiguous_schedule(program))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("beside", ["", "rounded"])
def test_what_ends_in_16_bits_takes_the_quick_functions(dtype: str, beside: str) -> None:
    text = source(exponential(dtype, beside))
    assert "device.quick_exp(" in text
    assert "exact=False" in text


@pytest.mark.parametrize("program", [exponential("float32"), exponential("bfloat16", "sum"), exponential("float64", math="float64")],
                         ids=["float32", "a float32 statistic beside", "float64"])
def test_what_is_kept_in_full_takes_the_exact_ones(program: Program) -> None:
    text = source(program)
    assert "device.exp(" in text
    assert "quick_exp" not in text
    assert "exact=False" not in text
