"""Both thin products of one matrix on a device: every configuration is as right as the library, the same each time, in graphs too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from fxfuse.kernels import thin_choice
from fxfuse.kernels.thin_pair import CONFIGS, Config, ThinPair, sizes_of
from fxfuse.kernels.thin_sites import accumulating_site, added_product_site, pair_site, product_site
from fxfuse.products.calls import thin_pair
from fxfuse.validation import error_ratio
from tests.thin_pairs import Operands, worst

DTYPES = (torch.bfloat16, torch.float16)


def operands(rows: int, columns: int, rank: int, dtype: torch.dtype = torch.bfloat16, wide: bool = False) -> Operands:
    def drawn(a: int, b: int, room: int) -> Tensor:
        return torch.randn(a, b + room, device="cuda").to(dtype)[:, room:]

    down = torch.empty(columns, rank, device="cuda", dtype=torch.float32 if wide else dtype)
    return Operands(drawn(rows, columns, 16), drawn(columns, rank, 0), drawn(rows, rank, 16), drawn(rows, rank, 32), down)


def launched(o: Operands, config: Config) -> None:
    sizes = sizes_of(*o[:4])
    assert sizes is not None
    ThinPair(sizes, config, o.matrix.device, 2.0, 0.5)(*o)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.rows}x{c.columns}w{c.warps}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns", "rank"), [
    (8192, 4096, 16), (8192, 14336, 16), (777, 1030, 8), (4096, 18944, 64), (100, 3584, 32),
])  # fmt: skip
def test_every_configuration(rows: int, columns: int, rank: int, dtype: torch.dtype, config: Config) -> None:
    o = operands(rows, columns, rank, dtype)
    try:
        launched(o, config)
    except OutOfResources as lacking:  # then it is no candidate
        assert rank > 16
        pytest.skip(str(lacking))
    assert worst(o, 2.0, 0.5) < 1.2


def test_the_same_each_time() -> None:
    o = operands(8192, 4096, 16, wide=True)
    for config in CONFIGS:
        launched(o, config)
        first = [o.across.clone(), o.down.clone()]
        for _ in range(5):
            launched(o, config)
            assert torch.equal(o.across, first[0])
            assert torch.equal(o.down, first[1])


def test_chosen_by_timing(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is chosen, the results are right, and the choice is made once."""
    monkeypatch.setenv("FXFUSE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(thin_choice, "_launches", {})
    monkeypatch.setattr(thin_choice, "_chosen", {})
    o = operands(8192, 14336, 16, wide=True)
    thin_choice.pair(*o, 2.0, 0.5)
    assert worst(o, 2.0, 0.5) < 1.2
    assert len(list((tmp_path / "tuned").glob("thin-*.json"))) == 1
    monkeypatch.setattr(thin_choice, "_timed", lambda *_: pytest.fail("timed again"))
    monkeypatch.setattr(thin_choice, "_chosen", {})
    monkeypatch.setattr(thin_choice, "_launches", {})
    thin_choice.pair(*operands(9000, 14336, 16), 2.0, 0.5)


@pytest.mark.parametrize("rows", [8192, 64])
def test_at_a_place_of_a_graph(rows: int) -> None:
    """What is remembered computes the same; other rows, strides and alignments are other entries."""
    pair, product = pair_site(), product_site()
    o = operands(rows, 14336, 16, wide=True)
    expected = thin_pair(None, 16, 48, o.matrix, o.right, o.left, 2.0, 0.5, True)
    wide = one(o.left, o.right.t())
    shifted = operands(rows // 2, 14336, 16)
    other = thin_pair(None, 16, 48, shifted.matrix, shifted.right, shifted.left, 2.0, 0.5, True)
    for _ in range(3):
        buffer, down = pair(None, 16, 48, o.matrix, o.right, o.left, 2.0, 0.5, True)
        assert torch.equal(buffer[:, 16:32], expected[0][:, 16:32])
        assert torch.equal(down, expected[1])
        assert torch.equal(product(o.left, o.right.t(), 2.0), wide)
        buffer, down = pair(None, 16, 48, shifted.matrix, shifted.right, shifted.left, 2.0, 0.5, True)
        assert torch.equal(buffer[:, 16:32], other[0][:, 16:32])
        assert torch.equal(down, other[1])
    tight = o.left.contiguous()
    assert torch.equal(product(tight, o.right.t(), 2.0), wide)
    odd = torch.empty(tight.numel() + 1, device="cuda", dtype=tight.dtype)[1:].view_as(tight).copy_(tight)
    assert error_ratio(product(odd, o.right.t(), 2.0), wide, 2.0 * tight.double() @ o.right.t().double()) < 1.2


@pytest.mark.parametrize("rows", [8192, 64])
def test_a_sum_at_a_place_of_a_graph(rows: int) -> None:
    """A term of low rank beside a matrix that stays; large enough to be timed, and not."""
    site, o = added_product_site(), operands(rows, 4096, 16)
    base = torch.randn(rows, 4096, device="cuda").to(o.left.dtype)
    before, expected = base.clone(), torch.addmm(base, o.left, o.right.t(), alpha=2.0)
    for _ in range(3):
        ours = site(base, o.left, o.right.t(), 2.0)
        assert error_ratio(ours, expected, base.double() + 2.0 * o.left.double() @ o.right.t().double()) < 1.2
        assert torch.equal(base, before)


@pytest.mark.parametrize("rows", [8192, 4092, 64])
def test_a_sum_in_place_has_the_bits_of_a_sum_apart(rows: int) -> None:
    site, apart, o = accumulating_site(), added_product_site(), operands(rows, 4096, 16)
    for _ in range(3):
        base = torch.randn(rows, 4096, device="cuda").to(o.left.dtype)
        expected = apart(base, o.left, o.right.t(), 2.0)
        assert torch.equal(site(base.clone(), o.left, o.right.t(), 2.0), expected)


def one(left: Tensor, right: Tensor) -> Tensor:
    from fxfuse.products.calls import product

    return product(left, right, 2.0)


def test_on_a_side_stream_and_in_a_graph() -> None:
    o = operands(8192, 4096, 16)
    buffer, expected = thin_pair(None, 0, 16, o.matrix, o.right, o.left, 2.0, 0.5, False)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        o.left.mul_(2)
        doubled = thin_pair(None, 0, 16, o.matrix, o.right, o.left, 2.0, 0.5, False)[1]
        o.left.mul_(0.5)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(doubled, expected * 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = thin_pair(None, 0, 16, o.matrix, o.right, o.left, 2.0, 0.5, False)
    o.left.mul_(4)
    graph.replay()
    assert torch.equal(again[0], buffer)
    assert torch.equal(again[1], expected * 4)
