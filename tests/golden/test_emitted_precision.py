"""Where the last bits of a float32 value are rounded away in the end, the emitted kernel computes it by the hardware's function."""

from __future__ import annotations

import pytest
import torch

from fxfuse.kernels.catalogue import contiguous_schedule, emit
from fxfuse.program import Lane, Program, ProgramBuilder
from fxfuse.validation import error_ratio


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


def gelu(dtype: str, plain: bool = False) -> Program:
    """x / 2 (1 + erf(x / sqrt 2)); ``plain``: only the erf."""
    b = ProgramBuilder(1, "float32")
    a = b.axis(None, "a")
    b.argument("x", dtype, (True,), a)
    x = b.load("x", Lane(a))
    erf = b.apply("erf", b.apply("mul", x, b.const(0.5**0.5)))
    value = erf if plain else b.apply("mul", b.apply("mul", b.const(0.5), x), b.apply("add", b.const(1.0), erf))
    b.output("y", dtype, (True,), a, ((value, Lane(a)),))
    return b.build()


def test_an_error_function_beside_a_constant_may_be_off_by_what_the_constant_hides() -> None:
    assert "device.quick_erf(" in source(gelu("bfloat16"))


@pytest.mark.parametrize("program", [gelu("float32"), gelu("bfloat16", plain=True)], ids=["float32", "near 0 it is relative"])
def test_other_error_functions_are_exact(program: Program) -> None:
    assert "tl.erf(" in source(program)


def capped(dtype: str, stored: str = "", cap: float = 50.0, beside: str = "") -> Program:
    """softmax(cap tanh(x / cap)); ``beside``: and the sum of its row ("sum"), the logarithm of that ("log"), or the tanh ("tanh")."""
    b = ProgramBuilder(1, "float32")
    a = b.axis(None, "a")
    b.argument("x", dtype, (True,), a)
    tanh = b.apply("tanh", b.apply("div", b.load("x", Lane(a)), b.const(cap)))
    logits = b.apply("mul", tanh, b.const(cap))
    shifted = b.apply("exp", b.apply("sub", logits, b.apply("stop", b.reduce("max", a, logits))))
    total = b.reduce("sum", a, shifted)
    b.output("y", stored or dtype, (True,), a, ((b.apply("div", shifted, total), Lane(a)),))
    if beside in ("sum", "log"):
        b.output("s", "float32", (True,), None, ((total if beside == "sum" else b.apply("log", total), None),))
    if beside == "tanh":
        b.output("t", dtype, (True,), a, ((tanh, Lane(a)),))
    return b.build()


@pytest.mark.parametrize("program", [capped("bfloat16"), capped("float16"), capped("bfloat16", beside="sum")])
def test_a_tanh_that_becomes_an_exponent_may_be_off_absolutely(program: Program) -> None:
    assert "device.tanh(" not in source(program)


@pytest.mark.parametrize("program", [
    capped("float32"), capped("bfloat16", "float32"), capped("float32", "bfloat16"), capped("bfloat16", cap=500.0),
    capped("bfloat16", beside="log"), capped("bfloat16", beside="tanh"),
], ids=["float32", "stored in float32", "of float32", "a large cap", "a logarithm beside", "itself beside"])
def test_any_other_tanh_is_relative(program: Program) -> None:
    assert "device.tanh(" in source(program)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_a_capped_softmax_in_16_bits_is_as_right_as_eager(scale: float) -> None:
    """The formula that the kernel has, in float32 on the CPU."""
    torch.manual_seed(0)
    x = (scale * torch.randn(64, 512)).bfloat16()
    tanh = 1 - 2 / (torch.exp2(x.float() / 50 * 2.8853900817779268) + 1)
    truth = torch.softmax(50 * torch.tanh(x.double() / 50), -1)
    exact = torch.softmax(50 * torch.tanh(x.float() / 50), -1).bfloat16()
    assert error_ratio(torch.softmax(50 * tanh, -1).bfloat16(), exact, truth) < 1.05


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 4.0])
def test_a_gelu_in_16_bits_is_as_right_as_eager(dtype: str, scale: float) -> None:
    """The formula that the kernel has, in float32 on the CPU."""
    torch.manual_seed(0)
    x = (scale * torch.randn(4096)).to(getattr(torch, dtype))
    a = x.float() * 0.5**0.5
    t = 1 / (1 + 0.3275911 * a.abs())
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    ours = (0.5 * x.float() * (1 + torch.where(a < 0, -1.0, 1.0) * (1 - series * torch.exp(-a * a)))).to(x.dtype)
    assert error_ratio(ours, torch.nn.functional.gelu(x), torch.nn.functional.gelu(x.double())) < 1.1
