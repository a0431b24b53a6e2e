"""A fault in the text of an emitted kernel makes a default backend decline the site; without it the site is fused."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from fxfuse import backend, lowering
from fxfuse.backend import Backend
from fxfuse.kernels import launch, single
from fxfuse.reporting.records import GraphRecord, Site
from fxfuse.validation import forget_verdicts


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(24))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


def train_step(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Site], list[Tensor], list[Tensor]]:
    """Sites, our gradients, eager's."""
    made: list[GraphRecord] = []
    make = backend.new_record
    monkeypatch.setattr(backend, "new_record", lambda: made.append(make()) or made[-1])  # type: ignore[func-returns-value]
    forget_verdicts()
    lowering.launcher.cache_clear()
    launch.prepare.cache_clear()
    module, x = Normed(), torch.randn(5, 24, requires_grad=True)
    leaves = [x, module.weight]
    ours = torch.autograd.grad(torch.compile(module, backend=Backend())(x).square().sum(), leaves)
    eager = torch.autograd.grad(module(x).square().sum(), leaves)
    return made[0].sites, list(ours), list(eager)


def test_a_right_kernel_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    (site,), ours, eager = train_step(monkeypatch)
    assert (site.status, site.implementation) == ("fused", "triton")
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("right", "wrong"), [(r"\+ 1e-06", "+ 1e-05"), (r"= (\S*rsqrt\()", r"= 0.999 * \1")],
                         ids=["eps", "factor"])
def test_a_faulty_kernel_is_declined(right: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    emit = single.emit
    planted = []

    def faulty(*args: object, **kwargs: object) -> str:
        source = emit(*args, **kwargs)  # type: ignore[arg-type]
        changed, count = re.subn(right, wrong, source)
        planted.extend([right] * count)
        return changed

    monkeypatch.setattr(single, "emit", faulty)
    (site,), ours, eager = train_step(monkeypatch)
    assert planted
    assert site.status == "declined"
    assert "times as far from float64 as eager's" in site.reason
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
