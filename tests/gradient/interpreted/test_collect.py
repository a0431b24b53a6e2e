"""The kernel that sums a few rows each, in Triton's interpreter, against a gather and a sum."""

from __future__ import annotations

import pytest
import torch

from fxfuse.kernels.collect import collect


@pytest.mark.parametrize("width", [1, 96, 1024, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("k", [2, 3])
def test_sums_are_those_of_gathered_rows(width: int, dtype: torch.dtype, k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    y, place = torch.randn(5 * k, width, generator=generator).to(dtype), torch.randperm(5 * k, generator=generator)
    found, wide = collect(y, place, k), torch.float64 if dtype == torch.float64 else torch.float32
    total = y[place[::k]].to(wide)
    for j in range(1, k):
        total = total + y[place[j::k]].to(wide)
    assert found.dtype == dtype
    assert torch.equal(found, total.to(dtype))


def test_no_rows() -> None:
    assert collect(torch.empty(0, 8), torch.empty(0, dtype=torch.int64), 2).shape == (0, 8)
