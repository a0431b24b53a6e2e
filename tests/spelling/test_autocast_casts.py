"""Casts that autocast makes unseen: written down, taken into the program that makes the activation, and one output for all readers."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn

import fxfuse.backend as backend
from fxfuse.reporting.records import GraphRecord


class Readers(nn.Module):
    """A float32 norm, read by three linears."""

    def __init__(self, width: int = 32, returned: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.RMSNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.returned = returned

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        y = self.norm(x)
        out = torch.cat([self.q(y), self.k(y), self.v(y)], -1)
        return (out, y.to(torch.bfloat16), y.to(torch.bfloat16)) if self.returned else out


def trained(module: nn.Module, run: nn.Module, x: Tensor, dtype: torch.dtype | None) -> list[Tensor]:
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        out = run(x)
    out = out[0] if isinstance(out, tuple) else out
    out.float().square().sum().backward()
    found = [out.detach(), x.grad, *(p.grad for p in module.parameters())]
    module.zero_grad(set_to_none=True)
    return [t for t in found if t is not None]


def compiled(module: nn.Module) -> nn.Module:
    torch.compiler.reset()
    options = backend.Backend(remainder="eager", strict=True, validate="off")
    return torch.compile(module, backend=options, dynamic=True, fullgraph=True)  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_norm_under_autocast_stores_16_bits_once(dtype: torch.dtype, records: list[GraphRecord]) -> None:
    module, x = Readers(), torch.randn(2, 9, 32)
    eager = trained(module, copy.copy(module), x, dtype)
    ours = trained(module, compiled(module), x, dtype)
    for got, want in zip(ours, eager, strict=True):
        assert got.dtype == want.dtype
        scale = float(want.float().square().mean().sqrt())
        assert float((got.float() - want.float()).square().mean().sqrt()) <= torch.finfo(dtype).eps * scale
    source = records[0].forward_source
    assert not re.search(r"aten\._to_copy\.default\((?!primals)", source)
    (call,) = re.findall(r"\w+ = (fxfuse_fused_\w+)\(", source)
    assert re.fullmatch(r"fxfuse_fused_y\d_s_\d", call)  # one output and a statistic


def test_without_autocast_nothing_is_cast(records: list[GraphRecord]) -> None:
    module, x = Readers(), torch.randn(2, 9, 32)
    ours, eager = trained(module, compiled(module), x, None), trained(module, copy.copy(module), x, None)
    for got, want in zip(ours, eager, strict=True):
        torch.testing.assert_close(got, want)
    assert "_to_copy" not in records[0].forward_source


def test_equal_results_that_are_returned_stay_two_tensors() -> None:
    module, x = Readers(returned=True), torch.randn(2, 9, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        _, first, second = compiled(module)(x)
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()
