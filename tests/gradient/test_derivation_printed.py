"""``fxfuse.derive``: the derivation of a plain function, as mathematics that is checked."""

from __future__ import annotations

import pytest
import sympy
import torch
from torch import Tensor

import fxfuse
from fxfuse.rules import load_patterns, operand_shapes

RULES = load_patterns()


def rms_norm(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w


def test_rms_norm_reads_as_in_a_paper() -> None:
    assert str(fxfuse.derive(rms_norm, torch.randn(4, 8), torch.randn(8))) == """\
forward
    r = 1/sqrt(1e-06 + sum_j(x**2)/n)
    y = r*w*x
saved: x, w, r
backward
    c = r**3*sum_j(g_y*w*x)/n
    d_x = g_y*r*w - c*x
    d_w = sum_rows(g_y*r*x)"""


def test_a_softmax_saves_its_result() -> None:
    derivation = fxfuse.derive(lambda x: torch.softmax(x, -1), torch.randn(4, 8))
    assert str(derivation).endswith("saved: y\nbackward\n    c = sum_j(g_y*y)\n    d_x = y*(g_y - c)")


def test_equations_are_sympy() -> None:
    derivation = fxfuse.derive(rms_norm, torch.randn(4, 8), torch.randn(8))
    r, x, w, g, c = (sympy.Symbol(name, real=True) for name in ("r", "x", "w", "g_y", "c"))
    assert derivation.saved == (x, w, r)
    assert dict(e.args for e in derivation.backward)[sympy.Symbol("d_x", real=True)] == g * r * w - c * x


def test_latex_has_sums_and_bars() -> None:
    latex = fxfuse.derive(rms_norm, torch.randn(4, 8), torch.randn(8)).latex()
    assert latex.startswith("\\begin{align*}\n")
    assert r"\bar{w} &= \sum_{\mathrm{rows}} \bar{y}\,r\,x" in latex
    assert r"10^{-6}" in latex


def test_triton_holds_both_kernels() -> None:
    pytest.importorskip("triton")
    source = fxfuse.derive(rms_norm, torch.randn(4, 8), torch.randn(8)).triton()
    assert source.count("def kernel(") == 2


def test_lanes_are_shown_as_slices() -> None:
    shapes = operand_shapes(RULES["rope"].function)
    text = str(fxfuse.derive(RULES["rope"], *(s.example() for s in shapes.values())))
    assert "d_x[0:4] = cos[0:4]*g_y[0:4] + g_y[4:8]*sin[4:8]" in text


@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_derived_and_agrees_with_autograd(name: str) -> None:
    rule = RULES[name]
    for function in (rule.function, *rule.spellings):
        examples = [shape.example() for shape in operand_shapes(function).values()]
        checked = fxfuse.derive(function, *examples).check()
        assert checked.passed, checked
        assert max(checked.errors.values()) < 1e-9


def test_roundings_of_the_function_stay_in_the_equations() -> None:
    def llama(x: Tensor, w: Tensor) -> Tensor:
        x32 = x.float()
        return w * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-6)).to(torch.bfloat16)

    derivation = fxfuse.derive(llama, torch.randn(4, 8).bfloat16(), torch.randn(8).bfloat16())
    assert "y = w*bf16(r*x)" in str(derivation)
    assert "d_w = sum_rows(g_y*bf16(r*x))" in str(derivation)


def test_bad_operands_are_named() -> None:
    with pytest.raises(TypeError, match=r"w is a float.*functools\.partial"):
        fxfuse.derive(rms_norm, torch.randn(4, 8), 1.0)  # type: ignore[arg-type]
    with pytest.raises(fxfuse.errors.UnsupportedGraph, match="cumsum"):
        fxfuse.derive(lambda x: torch.exp(x.cumsum(-1)) * x, torch.randn(4, 8))
