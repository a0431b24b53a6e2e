"""Thin products at places of graphs, kernels interpreted: first calls and later ones, other rows and strides; which addresses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fxfuse.kernels import thin_choice, thin_sites
from fxfuse.kernels.thin_sites import accumulating_site, added_product_site, pair_site, product_site
from fxfuse.products.calls import one_product, two_products
from fxfuse.validation import error_ratio
from tests.thin_pairs import Operands, worst

RANK, COLUMNS = 16, 64


def drawn(rows: int, columns: int, room: int = 0) -> Tensor:
    return torch.randn(rows, columns + room).bfloat16()[:, :columns]


def test_pairs_of_changing_rows_and_strides() -> None:
    site, right = pair_site(), drawn(COLUMNS, RANK)
    for rows, room in ((32, 0), (32, 0), (48, 0), (32, 8), (32, 0), (48, 8)):
        matrix, left = drawn(rows, COLUMNS, room), drawn(rows, RANK, room)
        buffer, down = site(None, 16, 48, matrix, right, left, 2.0, 0.5, True)
        assert worst(Operands(matrix, right, left, buffer[:, 16:32].clone(), down), 2.0, 0.5) < 1.2


def test_products_of_changing_rows() -> None:
    site, right = product_site(), drawn(COLUMNS, RANK).t()
    for rows in (32, 32, 48, 32):
        left, expected = drawn(rows, RANK, 8), drawn(rows, COLUMNS)
        one_product(left, right, expected, 2.0)
        assert error_ratio(site(left, right, 2.0), expected, 2.0 * left.double() @ right.double()) < 1.2


def test_sums_of_changing_rows_and_strides() -> None:
    site, right = added_product_site(), drawn(COLUMNS, RANK).t()
    for rows, room in ((32, 0), (32, 0), (48, 0), (32, 8), (32, 0)):
        left, base, expected = drawn(rows, RANK), drawn(rows, COLUMNS, room), drawn(rows, COLUMNS)
        before = base.clone()
        one_product(left, right, expected, 2.0, base)
        assert error_ratio(site(base, left, right, 2.0), expected, base.double() + 2.0 * left.double() @ right.double()) < 1.2
        assert torch.equal(base, before)


def test_sums_in_place_have_the_bits_of_sums_apart() -> None:
    """A stream that dies here is added to where it lies; one that is read again is not. Values must not tell."""
    site, apart, right = accumulating_site(), added_product_site(), drawn(COLUMNS, RANK).t()
    for rows, room in ((32, 0), (32, 0), (48, 0), (32, 8), (32, 0)):
        left, buffer = drawn(rows, RANK), drawn(rows, COLUMNS, room)
        expected = apart(buffer.clone(), left, right, 2.0) if not room else buffer.clone().addmm_(left, right, alpha=2.0)
        assert torch.equal(site(buffer, left, right, 2.0), expected)


def test_without_room_a_sum_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call at new sizes has memory of its own for its result, where a budget leaves that."""
    site, right, buffer = accumulating_site(), drawn(COLUMNS, RANK).t(), drawn(32, COLUMNS)
    monkeypatch.setattr(thin_sites.room, "is_there", lambda needed, device: False)
    assert site(buffer, drawn(32, RANK), right, 1.0).data_ptr() == buffer.data_ptr()
    monkeypatch.setattr(thin_sites.room, "is_there", lambda needed, device: needed <= buffer.nbytes)
    assert site(buffer, drawn(32, RANK), right, 1.0).data_ptr() != buffer.data_ptr()
    assert site(buffer, drawn(32, RANK), right, 1.0).data_ptr() == buffer.data_ptr()


def test_the_library_is_remembered_too(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(thin_choice, "pair", lambda *arguments: (asked.append(1), two_products(*arguments))[1])
    site, matrix, right, left = pair_site(), drawn(32, COLUMNS), drawn(COLUMNS, RANK), drawn(32, RANK)
    first = site(None, 0, RANK, matrix, right, left, 1.0, 1.0, False)
    second = site(None, 0, RANK, matrix, right, left, 1.0, 1.0, False)
    assert len(asked) == 1
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which address each argument of the kernels gets: the parts behind one another, the columns of the buffer."""
    launched: list[tuple[Any, tuple[int, ...]]] = []
    found = SimpleNamespace(length=100, offset=64, plan=SimpleNamespace(instances=3), sums=5, partial="parts", total="sums")
    monkeypatch.setattr(thin_sites, "INTERPRETED", False)
    monkeypatch.setattr(thin_sites, "launch_at", lambda kernel, places, instances, device: launched.append((kernel, places)))
    monkeypatch.setattr(thin_choice, "pair", lambda *arguments: found)
    site, matrix, right, left = pair_site(), drawn(32, COLUMNS), drawn(COLUMNS, RANK), drawn(32, RANK)
    site(None, 8, 48, matrix, right, left, 1.0, 1.0, True)
    buffer, down = site(None, 8, 48, matrix, right, left, 1.0, 1.0, True)
    (parts, first), (sums, second) = launched
    assert (parts, sums) == ("parts", "sums")
    assert first[:3] == (matrix.data_ptr(), right.data_ptr(), left.data_ptr())
    assert first[4] - first[3] == 64
    assert second == (first[3], first[4], buffer.data_ptr() + 16, down.data_ptr())
    assert down.dtype == torch.float32
