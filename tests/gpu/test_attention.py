"""Written-out attention on a GPU: as near to float64 as eager, in chunks, and products that add to float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxfuse.attention import execution
from fxfuse.attention.known_masks import forget_masks
from fxfuse.backend import Backend
from fxfuse.validation import LIMITS, error_ratio


def capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    repeat = lambda t: t[:, :, None].expand(-1, -1, groups, -1, -1).reshape(q.shape[0], -1, *t.shape[2:])  # noqa: E731
    scores = torch.tanh(torch.matmul(q, repeat(k).transpose(2, 3)) * q.shape[-1] ** -0.5 / 20) * 20 + mask
    return torch.matmul(F.softmax(scores, -1, dtype=torch.float32).to(q.dtype), repeat(v))


def results(function, inputs: list[Tensor], mask: Tensor) -> list[Tensor]:
    out = function(*inputs, mask)
    arriving = torch.randn(out.shape, generator=torch.Generator().manual_seed(6)).to(out)
    return [out.detach(), *torch.autograd.grad(out, inputs, arriving)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1000, 1024])
def test_as_near_to_float64_as_eager(dtype: torch.dtype, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "SCORES_BYTES", 2 * 8 * length * 2 * 192)  # 192 queries at once
    forget_masks()
    shapes = ((2, length, 8, 64), (2, length, 4, 64), (2, length, 4, 64))
    inputs = [torch.randn(s, device="cuda", dtype=dtype).transpose(1, 2).detach().requires_grad_() for s in shapes]
    mask = torch.full((length, length), torch.finfo(dtype).min, device="cuda", dtype=dtype).triu(1).expand(2, 1, -1, -1)
    fused = torch.compile(capped, backend=Backend(strict=True, rules=("attention",)), fullgraph=True, dynamic=True)
    ours, eager = results(fused, inputs, mask), results(capped, inputs, mask)
    truth = results(capped, [t.detach().double().requires_grad_() for t in inputs], mask.double())
    for name, a, b, t in zip(("out", "dq", "dk", "dv"), ours, eager, truth, strict=True):
        assert error_ratio(a, b, t) <= LIMITS[dtype], name


def test_sums_over_chunks_are_added_up_in_float32() -> None:
    into = torch.full((2, 80, 16), 256.0, device="cuda")
    a, b = (torch.ones(2, *s, device="cuda", dtype=torch.bfloat16) for s in ((64, 1), (1, 16)))
    execution.accumulate(into[:, 8:72], a, b)
    assert bool((into[:, 8:72] == 257).all())  # not a bfloat16
    assert bool((into[:, :8] == 256).all())
