"""Blocks in tiles on the GPU: gradients as near to float64 as eager's, and the peak that the simulation tells."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxfuse.memory.tiles import TileReport, tile, tile_freely
from fxfuse.validation import LIMITS, error_ratio
from tests.tiled_blocks import adapted_mlp, compiled, cut_every_graph, gradients

WIDTH, HIDDEN, RANK = 512, 2048, 16
AGAIN = "recompute:mm,mm_1,mm_2,addmm,addmm_1"
in_four = partial(tile, tiles=4)
# Of the first matmul on autograd's thread.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")


def mlp(trained: bool, width: int = WIDTH, hidden: int = HIDDEN) -> nn.Module:
    return adapted_mlp(width, hidden, RANK, torch.bfloat16, trained).cuda()


@pytest.fixture
def tiled(monkeypatch: pytest.MonkeyPatch) -> list[TileReport]:
    """Every graph is cut into four tiles."""
    torch.use_deterministic_algorithms(False)
    return cut_every_graph(monkeypatch, in_four)


@pytest.mark.parametrize("plan", ["keep", AGAIN], ids=["kept", "again"])
@pytest.mark.parametrize("trained", [False, True], ids=["adapters", "all"])
def test_output_and_gradients(trained: bool, plan: str, tiled: list[TileReport]) -> None:
    """Ragged last tile; then another length."""
    module = mlp(trained)
    run = compiled(module, plan)
    exact = copy.deepcopy(module).double()
    for length in (1500, 2049):
        x, g = (torch.randn(2, length, WIDTH, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        ours, eager = gradients(module, run, x, g), gradients(module, module, x, g)
        truth = gradients(exact, exact, x.double(), g.double())
        for name in eager:
            assert error_ratio(ours[name], eager[name], truth[name]) <= LIMITS[torch.bfloat16], name
    assert all(report.segments for report in tiled)
    again = gradients(module, run, x, g)
    assert all(torch.equal(again[name], ours[name]) for name in ours)


def peak_of(module: nn.Module, run: Any, x: Tensor, g: Tensor) -> int:
    """Bytes of a forward and backward beyond what is there before, the second time."""
    for _ in range(2):
        gradients(module, run, x, g)
        module.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    x = x.detach().requires_grad_()
    run(x).backward(g)
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("plan", ["keep", AGAIN], ids=["kept", "again"])
def test_the_peak_sinks_as_simulated(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.use_deterministic_algorithms(False)
    module = mlp(False, 1024, 5632)
    x, g = (torch.randn(2, 4096, 1024, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    plain = peak_of(module, compiled(module, plan), x, g)
    reports = cut_every_graph(monkeypatch, in_four)
    torch._dynamo.reset()
    cut = peak_of(module, compiled(module, plan), x, g)
    simulated = max(report.bytes_before for report in reports) - max(report.bytes_after for report in reports)
    assert plain - cut > 0.7 * simulated > 0


def test_tiles_that_are_free_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a backward that holds gate, up and the gradient of their product, in place of gate and up."""
    found = cut_every_graph(monkeypatch, tile_freely)
    torch.use_deterministic_algorithms(False)
    module = mlp(False, 3584, 18944)
    x, g = (torch.randn(1, 8192, 3584, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    gradients(module, compiled(module, "keep"), x, g)
    backward = found[-1]
    assert backward is not None
    assert backward.bytes_after < 0.9 * backward.bytes_before
