"""A product over a short contraction in Triton's interpreter: right for any sizes and strides; planted faults are seen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fxfuse.kernels import thin_outer, thin_outer_kernel
from fxfuse.kernels.thin_outer import Config, ThinOuter, sizes_of
from fxfuse.products.calls import one_product, product
from fxfuse.validation import error_ratio
from tests.planted_faults import with_fault

SMALL = Config(16, 32, 4)
DTYPES = (torch.bfloat16, torch.float16)


def operands(rows: int, columns: int, rank: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """The left factor beside other columns, the right one as a transpose, the result in wider rows."""
    generator = torch.Generator().manual_seed(0)

    def drawn(a: int, b: int, room: int) -> Tensor:
        return torch.randn(a, b + room, generator=generator).to(dtype)[:, room:]

    return drawn(rows, rank, 16), drawn(columns, rank, 0).t(), drawn(rows, columns, 8)


def ratio(left: Tensor, right: Tensor, ours: Tensor, alpha: float) -> float:
    eager = torch.empty_like(ours)
    one_product(left, right, eager, alpha)
    return error_ratio(ours, eager, alpha * left.double() @ right.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns", "rank"), [(96, 64, 16), (50, 37, 16), (64, 64, 8), (33, 100, 3), (17, 96, 48), (1, 1, 1)])
def test_any_sizes(rows: int, columns: int, rank: int, dtype: torch.dtype) -> None:
    left, right, out = operands(rows, columns, rank, dtype)
    beside = out.as_strided((rows, 8), (columns + 8, 1), 0).clone()
    sizes = sizes_of(left, right, None, out)
    assert sizes is not None
    ThinOuter(sizes, SMALL, torch.device("cpu"), -0.7)(left, right, out, out)
    assert ratio(left, right, out, -0.7) < 1.5
    assert torch.equal(out.as_strided((rows, 8), (columns + 8, 1), 0), beside)


@pytest.mark.parametrize("transposed", [True, False])
def test_called(transposed: bool) -> None:
    left, right, _ = operands(40, 64, 16)
    right = right if transposed else right.contiguous()
    assert ratio(left, right, product(left, right, 2.0), 2.0) < 1.5


def test_what_it_does_not_take() -> None:
    left, right, out = operands(40, 64, 16)
    assert sizes_of(left.float(), right, None, out) is None
    assert sizes_of(left.t().contiguous().t(), right, None, out) is None
    assert sizes_of(left, right[:8], None, out) is None
    assert sizes_of(*operands(40, 64, 65)[:2], None, out) is None
    assert sizes_of(left, right, out, out) is not None
    for base in (out.float(), out[:1].expand(40, 64), out[:, :1], out.t().contiguous().t()):
        assert sizes_of(left, right, base, out) is None


@pytest.mark.parametrize(("before", "after"), [
    (" * alpha\n", "\n"), ("// blocks) * ROWS", "// blocks) * (ROWS - 1)"), ("rank < RANK", "rank < RANK - 1"),
])  # fmt: skip
def test_planted_faults_are_seen(before: str, after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty = with_fault(thin_outer_kernel, before, after, tmp_path, monkeypatch)
    left, right, out = operands(48, 64, 16)
    monkeypatch.setattr(thin_outer, "outer_kernel", faulty.outer_kernel)
    ThinOuter(sizes_of(left, right, None, out), SMALL, torch.device("cpu"), 2.0)(left, right, out, out)
    assert not ratio(left, right, out, 2.0) < 2


def added(left: Tensor, right: Tensor, base: Tensor, out: Tensor) -> float:
    """The error of ``base - 0.7 * left @ right``, rounded once, beside the library's."""
    sizes = sizes_of(left, right, base, out)
    assert sizes is not None
    ThinOuter(sizes, SMALL, torch.device("cpu"), -0.7)(left, right, base, out)
    eager = torch.empty_like(out)
    one_product(left, right, eager, -0.7, base)
    return error_ratio(out, eager, base.double() - 0.7 * left.double() @ right.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns", "rank"), [(96, 64, 16), (50, 37, 16), (17, 96, 48)])
def test_added_to_what_stays(rows: int, columns: int, rank: int, dtype: torch.dtype) -> None:
    left, right, out = operands(rows, columns, rank, dtype)
    base = torch.randn(rows, columns + 3).to(dtype)[:, 3:] * 4
    before = base.clone()
    assert added(left, right, base, out) < 1.2
    assert torch.equal(base, before)


@pytest.mark.parametrize(("before", "after"), [
    ("base + place[:, None] * base_stride", "base + place[:, None] * out_stride"), ("b_out += b_base", "b_out += b_base * 0"),
    ("b_out += b_base", "b_out -= b_base"),
])  # fmt: skip
def test_planted_faults_in_the_sum_are_seen(before: str, after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty = with_fault(thin_outer_kernel, before, after, tmp_path, monkeypatch)
    left, right, out = operands(48, 64, 16)
    monkeypatch.setattr(thin_outer, "outer_kernel", faulty.outer_kernel)
    assert not added(left, right, torch.randn(48, 64).bfloat16() * 4, out) < 2
