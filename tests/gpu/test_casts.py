"""Small casts in one launch on a device: bit for bit torch's, denormals too; in a graph; faster than torch's for lists."""

from __future__ import annotations

import pytest
import torch

from fxfuse.kernels.casts import SLOTS, cast_all
from fxfuse.kernels.tuning import times_on_device
from fxfuse.small_casts import cast_together

SHAPES = [(16, 4096), (4096, 16)] * 4 + [(16, 14336), (14336, 16), (14336, 16), (16, 4096), (4096, 16), (1024, 16)] * 2


@pytest.mark.parametrize("result", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [3, 14, SLOTS + 3])
def test_as_torch_casts(count: int, result: torch.dtype) -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (sum(a * b for a, b in SHAPES),), device="cuda", dtype=torch.int32)
    wide = [part.view(shape).clone() for part, shape in zip(
        bits.view(torch.float32).split([a * b for a, b in SHAPES]), SHAPES, strict=True)][:count]
    narrow = cast_together(wide, result)
    for ours, tensor in zip(narrow, wide, strict=True):
        assert torch.equal(ours.isnan(), tensor.isnan())
        assert torch.equal(torch.where(ours.isnan(), 0, ours), torch.where(tensor.isnan(), 0, tensor.to(result)))
    for ours, tensor in zip(cast_together(narrow, torch.float32), narrow, strict=True):
        assert torch.equal(torch.where(ours.isnan(), 0, ours), torch.where(tensor.isnan(), 0, tensor.float()))


def test_time() -> None:
    wide = [torch.randn(shape, device="cuda") for shape in SHAPES[:14]]
    narrow = [torch.empty_like(tensor, dtype=torch.bfloat16) for tensor in wide]
    assert cast_all(wide, narrow)
    ours, theirs = times_on_device([lambda: cast_all(wide, narrow), lambda: torch._foreach_copy_(narrow, wide)])
    print(f"{ours * 1e3:.1f} us, torch {theirs * 1e3:.1f} us")
    assert ours < theirs


def test_in_a_graph() -> None:
    wide = [torch.randn(shape, device="cuda") for shape in SHAPES[:6]]
    cast_together(wide, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        narrow = cast_together(wide, torch.bfloat16)
    wide[3].mul_(3)
    graph.replay()
    assert all(torch.equal(ours, tensor.bfloat16()) for ours, tensor in zip(narrow, wide, strict=True))
