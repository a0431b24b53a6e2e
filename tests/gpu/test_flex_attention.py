"""FlexAttention on a GPU: chosen by measurement, as near to float64 as eager, back to chunks where the mask does more."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from fxfuse.attention import flex, layouts
from fxfuse.attention.known_masks import forget_masks
from fxfuse.backend import Backend
from fxfuse.validation import LIMITS, error_ratio
from tests.gpu.test_attention import capped, results


@pytest.fixture(autouse=True)
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """FlexAttention wherever it can, no layout known; the directions that it ran in."""
    directions: list[str] = []
    compiled = flex.compiled
    monkeypatch.setattr(flex, "compiled", lambda asked: directions.append(asked.direction) or compiled(asked))
    monkeypatch.setenv("FXFUSE_ATTENTION", "flex")
    monkeypatch.setattr(layouts, "_layouts", {})
    monkeypatch.setattr(layouts, "_compiled", Counter())
    monkeypatch.setattr(layouts, "_now", layouts._Now())
    forget_masks()
    torch._dynamo.reset()
    return directions


def operands(dtype: torch.dtype, length: int, width: int) -> tuple[list[Tensor], Tensor]:
    shapes = ((2, length, 8, width), (2, length, 4, width), (2, length, 4, width))
    inputs = [torch.randn(s, device="cuda", dtype=dtype).transpose(1, 2).detach().requires_grad_() for s in shapes]
    return inputs, torch.full((length, length), torch.finfo(dtype).min, device="cuda", dtype=dtype).triu(1).expand(2, 1, -1, -1)


def judge(inputs: list[Tensor], mask: Tensor) -> None:
    fused = torch.compile(capped, backend=Backend(strict=True, rules=("attention",)), fullgraph=True, dynamic=True)
    ours, eager = results(fused, inputs, mask), results(capped, inputs, mask)
    truth = results(capped, [t.detach().double().requires_grad_() for t in inputs], mask.double())
    for name, a, b, t in zip(("out", "dq", "dk", "dv"), ours, eager, truth, strict=True):
        assert error_ratio(a, b, t) <= LIMITS[a.dtype], name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("length", "width"), [(1024, 256), (1000, 64)])
def test_as_near_to_float64_as_eager(dtype: torch.dtype, length: int, width: int, ran: list[str]) -> None:
    judge(*operands(dtype, length, width))
    assert ran == ["forward", "backward"]


def test_a_window_is_taken_too(ran: list[str]) -> None:
    inputs, mask = operands(torch.bfloat16, 1024, 64)
    judge(inputs, mask + torch.full((1024, 1024), torch.finfo(torch.bfloat16).min, device="cuda", dtype=torch.bfloat16).tril(-300))
    assert ran == ["forward", "backward"]


def test_a_bias_in_the_mask_goes_over_chunks(ran: list[str]) -> None:
    inputs, mask = operands(torch.bfloat16, 512, 64)
    judge(inputs, mask + 0.5)
    assert ran == []
