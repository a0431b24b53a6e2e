"""Functions under ``fxfuse.fuse``: whatever a call differs in from earlier ones, it gives what the plain function gives."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import fxfuse

FACTOR = 2.0
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
MORE = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))


def mean_over_all(x: Tensor) -> Tensor:
    return x.exp() / x.shape[0] + x


def by_elements(x: Tensor) -> Tensor:
    return x.tanh() * math.sqrt(x.numel()) + x


def by_length(x: Tensor) -> Tensor:
    return x.tanh() * x * (2 if len(x) > 5 else 3)


def by_heads(x: Tensor) -> Tensor:
    return x.view(x.shape[0] // 2, 2, 8).softmax(-1).view(x.shape) * 2


@pytest.mark.parametrize("function", [mean_over_all, by_elements, by_length, by_heads])
def test_a_function_that_computes_with_the_number_of_rows(function: Callable) -> None:
    fused = fxfuse.fuse(function)
    for x in (X, MORE, X, MORE[:2]):
        assert torch.allclose(fused(x), function(x), rtol=1e-6, atol=1e-6)


def test_the_number_of_rows_alone_makes_no_other_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = []
    original = fxfuse.fusing._traced
    monkeypatch.setattr(fxfuse.fusing, "_traced", lambda call: traced.append(call) or original(call))
    fused = fxfuse.fuse(lambda x, w: torch.nn.functional.rms_norm(x, x.shape[-1:], w))
    for x in (X, MORE, X.expand(3, 4, 8), MORE.expand(5, 6, 8)):
        fused(x, X[0])
    assert len(traced) == 2, "one for each number of dimensions"


def polynomial(x: Tensor, weights: Any, *, add: Any = 0.0) -> Tensor:
    first, second = weights.values() if isinstance(weights, dict) else weights
    return x.square() * first + x * second + add


@pytest.mark.parametrize("weights", [[2.0, 3.0], (2.0, 3.0), [X, X[0]], (X, MORE[:4]), {"a": X, "b": 1.5}, {"a": 1.5, "b": X}])
def test_arguments_in_containers(weights: Any) -> None:
    fused = fxfuse.fuse(polynomial)
    for add in (0.0, 1.0, torch.tensor(2.0), X):
        assert torch.allclose(fused(X, weights, add=add), polynomial(X, weights, add=add))


def test_the_sign_of_zero() -> None:
    fused = fxfuse.fuse(lambda x, c: x.exp() / c)
    assert [float(fused(X, c).flatten()[0]) for c in (0.0, -0.0)] == [math.inf, -math.inf]


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor, self.weight = 2.0, nn.Parameter(torch.ones(8))

    def plain(self, x: Tensor) -> Tensor:
        return (x.tanh() + x) * self.factor * self.weight

    fused = fxfuse.fuse(plain)


def test_what_a_function_reads_around_it_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    held = 3.0

    def function(x: Tensor) -> Tensor:
        return (x.tanh() + x) * FACTOR * held

    module = Scale()
    pairs = [(fxfuse.fuse(function), function), (fxfuse.fuse(module.plain), module.plain),
             (functools.partial(Scale.fused, module), module.plain)]

    def compare() -> None:
        for fused, plain in pairs:
            assert torch.allclose(fused(X), plain(X))

    compare()
    monkeypatch.setattr(__import__("sys").modules[__name__], "FACTOR", 5.0)
    held = 7.0
    module.factor = 11.0
    compare()
    module.weight = nn.Parameter(torch.full((8,), 0.5))
    compare()
    with torch.no_grad():
        module.weight.mul_(3.0)
    compare()


def test_forward_mode_is_the_plain_functions() -> None:
    fused = fxfuse.fuse(by_elements)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(X, MORE[:4])
        got, want = (forward_ad.unpack_dual(f(dual)).tangent for f in (fused, by_elements))
    assert torch.allclose(got, want)


def test_captured_modules_leave_forward_mode_to_eager() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU())
    with forward_ad.dual_level():
        want = forward_ad.unpack_dual(model(forward_ad.make_dual(X, MORE[:4]))).tangent
    fxfuse.optimize(model)
    model(X.clone().requires_grad_()).sum().backward()
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(model(forward_ad.make_dual(X, MORE[:4]))).tangent
    assert torch.equal(got, want)


def test_a_fused_function_is_derived_as_the_plain_one() -> None:
    assert str(fxfuse.derive(fxfuse.fuse(normed), X)) == str(fxfuse.derive(normed, X))


def normed(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def test_a_softplus_that_is_cut_off_early_keeps_its_threshold() -> None:
    x = torch.linspace(-8.0, 14.0, 64).view(8, 8).requires_grad_()
    model = fxfuse.optimize(CutOff())
    assert torch.allclose(model(x), torch.nn.functional.softplus(x, threshold=5.0) * 2, rtol=1e-6, atol=1e-7)
    assert torch.allclose(fxfuse.fuse(usual_softplus)(x), usual_softplus(x), rtol=1e-6, atol=1e-7)


class CutOff(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.softplus(x, threshold=5.0) * 2


def usual_softplus(x: Tensor) -> Tensor:
    return torch.nn.functional.softplus(x) * 2
