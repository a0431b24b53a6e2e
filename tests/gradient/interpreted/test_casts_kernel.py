"""Small casts in one launch, interpreted: bit for bit torch's, whatever their number; what does not suit; planted faults are seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fxfuse.kernels import casts, casts_kernel
from fxfuse.kernels.casts import BLOCK, SLOTS, cast_all
from fxfuse.small_casts import cast_together
from tests.planted_faults import with_fault

SPECIAL = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1.00390625, 3e38, 1.5e-38])
NARROW = (torch.bfloat16, torch.float16)
PAIRS = [*((torch.float32, dtype) for dtype in NARROW), *((dtype, torch.float32) for dtype in NARROW)]


def drawn(count: int, dtype: torch.dtype) -> list[Tensor]:
    """Tensors of one to three blocks, special numbers at their ends."""
    made = [torch.randn((k % 3 + 1) * BLOCK) for k in range(count)]
    for tensor in made:
        tensor[-len(SPECIAL) :] = SPECIAL
    return [tensor.to(dtype).view(-1, 16) for tensor in made]


@pytest.mark.parametrize(("source", "result"), PAIRS, ids=str)
def test_as_torch_casts(source: torch.dtype, result: torch.dtype) -> None:
    for count in (1, 3, SLOTS, SLOTS + 2):
        tensors = drawn(count, source)
        for ours, tensor in zip(cast_together(tensors, result), tensors, strict=True):
            assert torch.equal(ours.isnan(), tensor.isnan())
            assert torch.equal(ours.nan_to_num(), tensor.to(result).nan_to_num())
            assert ours.dtype == result


SPOILED: dict[str, Callable[[Tensor], Tensor]] = {
    "size": lambda t: t[:, :5].contiguous(),
    "empty": lambda t: t.view(-1)[:0].clone(),
    "address": lambda t: torch.empty(t.numel() + 1)[1:].copy_(t.view(-1)),
}


@pytest.mark.parametrize("how", SPOILED)
def test_what_does_not_suit(how: str) -> None:
    tensors = drawn(3, torch.float32)
    tensors[1] = SPOILED[how](tensors[1])
    results = [torch.empty_like(tensor, dtype=torch.bfloat16) for tensor in tensors]
    assert not cast_all(tensors, results)
    for ours, tensor in zip(cast_together(tensors, torch.bfloat16), tensors, strict=True):
        assert torch.equal(ours.isnan(), tensor.isnan())
        assert torch.equal(ours.nan_to_num(), tensor.bfloat16().nan_to_num())


@pytest.mark.parametrize(("before", "after"), [
    ("instance >= b2:", "instance > b2:"), ("s2, d2, b2", "s2, d1, b2"), ("(instance - first)", "instance"),
])  # fmt: skip
def test_planted_faults_are_seen(before: str, after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty = with_fault(casts_kernel, before, after, tmp_path, monkeypatch)
    monkeypatch.setattr(casts, "cast_kernel", faulty.cast_kernel)
    casts._kernel.cache_clear()
    tensors = [torch.randn(BLOCK * 2) for _ in range(4)]
    whole = torch.zeros(16 * BLOCK, dtype=torch.bfloat16)  # a fault may write behind a result
    results = list(whole[: 8 * BLOCK].split(BLOCK * 2))
    cast_all(tensors, results)
    casts._kernel.cache_clear()
    assert not all(torch.equal(ours, tensor.bfloat16()) for ours, tensor in zip(results, tensors, strict=True))
