"""Both thin products of one matrix in Triton's interpreter: right for any sizes, strides and splits; planted faults are seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fxfuse.kernels import thin_pair, thin_pair_kernel
from fxfuse.kernels.thin_pair import Config, ThinPair, sizes_of
from fxfuse.products.calls import thin_pair as call
from tests.planted_faults import with_fault
from tests.thin_pairs import Operands, worst

SMALL = Config(16, 32, 4, 2, 2)
DTYPES = (torch.bfloat16, torch.float16)


def operands(rows: int, columns: int, rank: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Operands:
    """Rows of every operand further apart than they are long, the rank's columns beside others."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(a: int, b: int, room: int) -> Tensor:
        return torch.randn(a, b + room, generator=generator).to(dtype)[:, room:]

    return Operands(drawn(rows, columns, 8), drawn(columns, rank, 3), drawn(rows, rank, 5), drawn(rows, rank, 24),
                    drawn(columns, rank, 0))  # fmt: skip


def launched(o: Operands, config: Config = SMALL, alpha: float = 2.0, beta: float = 0.5) -> float:
    sizes = sizes_of(*o[:4])
    assert sizes is not None
    ThinPair(sizes, config, torch.device("cpu"), alpha, beta)(*o)
    return worst(o, alpha, beta)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns", "rank"), [(96, 64, 16), (50, 37, 16), (64, 64, 8), (33, 100, 3), (17, 96, 24), (1, 32, 1)])
def test_any_sizes(rows: int, columns: int, rank: int, dtype: torch.dtype) -> None:
    assert launched(operands(rows, columns, rank, dtype)) < 1.5


@pytest.mark.parametrize("config", [replace(SMALL, waves=1), replace(SMALL, waves=8), replace(SMALL, rows=32, columns=16)], ids=str)
def test_any_split_gives_the_same(config: Config) -> None:
    assert launched(operands(200, 80, 16), config) < 1.5


def test_a_column_major_right_factor() -> None:
    o = operands(48, 64, 16)
    assert launched(o._replace(right=o.right.t().contiguous().t())) < 1.5


def test_what_lies_beside_is_left_alone() -> None:
    o = operands(40, 64, 16)
    beside = o.across.as_strided((40, 24), (40, 1), 0).clone()
    launched(o)
    assert torch.equal(o.across.as_strided((40, 24), (40, 1), 0), beside)


@pytest.mark.parametrize("wrong", [
    lambda o: o._replace(matrix=o.matrix.float()), lambda o: o._replace(left=o.left[:, :8]), lambda o: o._replace(matrix=o.matrix.t()),
    lambda o: operands(4, 64, 65), lambda o: o._replace(left=o.left.half()), lambda o: o._replace(right=o.right[1:]),
])  # fmt: skip
def test_what_it_does_not_take(wrong) -> None:
    assert sizes_of(*wrong(operands(48, 48, 16))[:4]) is None


def test_called_with_a_buffer_and_without() -> None:
    o = operands(48, 64, 16)
    buffer = torch.zeros(48, 40, dtype=torch.bfloat16)
    same, down = call(buffer, 8, 40, o.matrix, o.right, o.left, 2.0, 0.5, False)
    assert same is buffer
    assert not buffer[:, :8].any()
    assert not buffer[:, 24:].any()
    assert worst(o._replace(across=buffer[:, 8:24].clone(), down=down), 2.0, 0.5) < 1.5
    fresh, again = call(None, 0, 16, o.matrix, o.right, o.left, 2.0, 0.5, False)
    assert torch.equal(fresh, buffer[:, 8:24])
    assert torch.equal(again, down)
    wide = call(None, 0, 16, o.matrix, o.right, o.left, 2.0, 0.5, True)[1]
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide.double(), 0.5 * o.matrix.double().t() @ o.left.double(), rtol=1e-5, atol=1e-5)


FAULTS = {
    "a part is lost": ("range(0, count, PARTS)", "range(PARTS, count + PARTS, PARTS)"),
    "the factor is lost": ("round_to(total * factor,", "round_to(total,"),
    "rows of another tile": ("left + place[:, None]", "left + (place[:, None] // 2)"),
    "the last rows are lost": ("end = tl.minimum(first + rows_each, rows)", "end = tl.minimum(first + rows_each - 1, rows)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty = with_fault(thin_pair_kernel, *FAULTS[fault], tmp_path, monkeypatch)
    o = operands(96, 64, 16)
    monkeypatch.setattr(thin_pair, "parts_kernel", faulty.parts_kernel)
    monkeypatch.setattr(thin_pair, "sums_kernel", faulty.sums_kernel)
    ThinPair(sizes_of(*o[:4]), SMALL, torch.device("cpu"), 2.0, 0.5)(*o)
    assert worst(o, 2.0, 0.5) > 2
