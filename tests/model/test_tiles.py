"""Whole models with their blocks in tiles: losses and gradients as in eager, over kinds of blocks and with 4-bit weights."""

from __future__ import annotations

import copy
from functools import partial

import pytest
from torch import nn

import fxfuse
from fxfuse.memory.tiles import TileReport, tile
from fxfuse.validation import error_ratio
from tests.model.builders import causal_lm, gemma2, step, tokens
from tests.model.quantized_models import in_4bit, with_adapters
from tests.tiled_blocks import cut_every_graph

# Gated, plain with biases and norms of both kinds, packed, with post-norms, parallel to attention.
KINDS = ("llama", "gpt2", "phi3", "gemma2", "gpt_neox")


@pytest.fixture
def tiled(monkeypatch: pytest.MonkeyPatch) -> list[TileReport]:
    """Every graph is cut into three tiles."""
    return cut_every_graph(monkeypatch, partial(tile, tiles=3))


def compared(model: nn.Module, exact: nn.Module, reports: list[TileReport]) -> None:
    batch = tokens()
    eager, truth = step(model, batch), step(exact, batch)
    fxfuse.optimize(model, remainder="eager", strict=True)
    for _ in range(2):
        ours = step(model, batch)
        assert set(ours) == set(eager)
        far = {name: error_ratio(ours[name], eager[name], truth[name]) for name in eager}
        assert {name: ratio for name, ratio in far.items() if not ratio <= 2} == {}
    assert any(report.segments for report in reports)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=() if kind in ("llama", "gpt2") else pytest.mark.slow) for kind in KINDS])
def test_losses_and_gradients(kind: str, tiled: list[TileReport]) -> None:
    model = gemma2(2) if kind == "gemma2" else causal_lm(kind, 2)  # (its own heads are wider than these MLPs)
    compared(model, copy.deepcopy(model).double(), tiled)


def test_packed_weights_and_adapters(tiled: list[TileReport], monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are dequantized for each tile and each use."""
    pytest.importorskip("bitsandbytes")
    from fxfuse.memory.tiles import choose
    from tests.model.test_qlora import in_float64

    monkeypatch.setattr(choose, "SCARCE", 2)
    model = with_adapters(in_4bit(causal_lm("qwen2", 2)))
    model.enable_input_require_grads()
    compared(model, in_float64(model), tiled)
    assert any("dequantize_4bit" in source for report in tiled for source in report.sources)
