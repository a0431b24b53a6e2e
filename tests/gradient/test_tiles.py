"""Gradients of blocks that run in tiles are those of blocks that do not, as near to float64; and the tests would see a fault."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxfuse import lowering
from fxfuse.memory.tiles import TileReport, loop, tile
from fxfuse.validation import LIMITS, error_ratio
from tests.tiled_blocks import adapted_mlp, compiled, cut_every_graph, gradients

WIDTH, HIDDEN, RANK = 32, 112, 4
BATCH, LENGTH = 3, 101


@pytest.fixture
def tiled(monkeypatch: pytest.MonkeyPatch) -> list[TileReport]:
    """Every graph is cut into four tiles; on the CPU too, results are stored over operands."""
    torch.use_deterministic_algorithms(False)  # under a plan products are arranged only then
    monkeypatch.setattr(lowering, "REUSE_ON_CPU", True)
    return cut_every_graph(monkeypatch, partial(tile, tiles=4))


def worst(module: nn.Module, run: Any, x: Tensor, g: Tensor, times: int = 1) -> float:
    """The largest error ratio of output and gradients, in parts of what is allowed."""
    ours = gradients(module, run, x, g, times)
    eager = gradients(module, module, x, g)
    exact_module = copy.deepcopy(module).double()
    exact = gradients(exact_module, exact_module, x.double(), g.double())
    assert set(ours) == set(eager)
    return max(error_ratio(ours[name], eager[name], exact[name]) / LIMITS[ours[name].dtype] for name in eager)


def mlp(dtype: torch.dtype, trained: bool) -> nn.Module:
    return adapted_mlp(WIDTH, HIDDEN, RANK, dtype, trained)


def drawn(dtype: torch.dtype, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, length, WIDTH, dtype=dtype), torch.randn(BATCH, length, WIDTH, dtype=dtype)


# Names of the products gate and up in the joint graph, with which the backward computes them again.
AGAIN = "recompute:mm,mm_2,addmm,addmm_1,mm_1"


@pytest.mark.parametrize(("dtype", "trained", "plan"), [
    pytest.param(torch.bfloat16, False, "none", id="adapters"),
    pytest.param(torch.bfloat16, False, AGAIN, id="adapters, gate and up again"),
    pytest.param(torch.bfloat16, True, AGAIN, id="all weights"),
    pytest.param(torch.float64, True, "none", id="all weights in float64"),
])
def test_output_and_gradients(dtype: torch.dtype, trained: bool, plan: str, tiled: list[TileReport]) -> None:
    """Ragged last tile; then other lengths, shorter than a tile and much longer, without compiling again."""
    module = mlp(dtype, trained)
    run = compiled(module, plan)
    assert worst(module, run, *drawn(dtype)) <= 1
    forward, backward = tiled
    assert forward.segments
    assert backward.segments or trained  # sums of weight gradients may cost more than tiles save
    for length in (2, 7, 400):
        assert worst(module, run, *drawn(dtype, length)) <= 1
    assert len(tiled) == 2


def test_a_graph_that_is_kept(tiled: list[TileReport]) -> None:
    """Saved tensors are there for a second backward."""
    module = mlp(torch.float32, False)
    assert worst(module, compiled(module), *drawn(torch.float32), times=3) <= 1


def test_two_runs_give_the_same_bits(tiled: list[TileReport]) -> None:
    module = mlp(torch.bfloat16, True)
    run, (x, g) = compiled(module, AGAIN), drawn(torch.bfloat16)
    first, second = gradients(module, run, x, g), gradients(module, run, x, g)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradients_accumulate(tiled: list[TileReport]) -> None:
    """Two micro-batches, the second forward before the first backward."""
    module, (x, g), (x2, g2) = mlp(torch.float64, False), drawn(torch.float64), drawn(torch.float64, 57)
    run = compiled(module)

    def both(call: Any) -> list[Tensor]:
        module.zero_grad()
        first, second = call(x.clone().requires_grad_()), call(x2.clone().requires_grad_())
        first.backward(g)
        second.backward(g2)
        return [p.grad for p in module.parameters() if p.grad is not None]

    for ours, theirs in zip(both(run), both(module), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-10)


def _lost_last(self: loop.Loop, run: Any, flat: Any, sinks: Any, start: int, size: int) -> None:
    if start == 0:
        _RUN(self, run, flat, sinks, start, size)


def _shifted(flat: Tensor, rows: Any, start: int, size: int) -> Tensor:
    return _PART(flat, rows, max(start - 1, 0), size)


def _stale(self: loop.Loop, place: loop.Place, operands: Any, total: int) -> Tensor:
    return _MADE(self, place, operands, total).fill_(0.01)


_RUN, _PART, _MADE = loop.Loop._run, loop.part, loop.Loop._made
FAULTS = {
    "the tiles after the first are lost": (loop.Loop, "_run", _lost_last),
    "a tile reads and writes a row of its neighbour": (loop, "part", _shifted),
    "sums do not begin with zero": (loop.Loop, "_made", _stale),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault: str, tiled: list[TileReport], monkeypatch: pytest.MonkeyPatch) -> None:
    module = mlp(torch.float32, False)
    run, data = compiled(module, AGAIN), drawn(torch.float32)
    assert worst(module, run, *data) <= 1
    monkeypatch.setattr(*FAULTS[fault])
    assert not worst(module, run, *data) <= 1
