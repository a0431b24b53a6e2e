"""Blocks in tiles whose sums take their thin terms in: what is copied beside its thin term is copied tile by tile."""

from __future__ import annotations

import pytest
import torch

from fxfuse.memory.tiles import TileReport
from fxfuse.products import augmented
from fxfuse.reporting.records import GraphRecord
from tests.gradient.test_tiles import AGAIN, tiled, worst
from tests.tiled_blocks import adapted_mlp, compiled

__all__ = ["tiled"]


def test_output_and_gradients(tiled: list[TileReport], monkeypatch: pytest.MonkeyPatch, records: list[GraphRecord]) -> None:
    """Weights are copied, too, once for all tiles."""
    monkeypatch.setattr(augmented, "LEAST", 0)
    monkeypatch.setattr(augmented, "COPY", 0.2)
    module = adapted_mlp(64, 224, 8, torch.bfloat16, trained=False)
    x, g = (torch.randn(3, 501, 64, dtype=torch.bfloat16) for _ in range(2))
    assert worst(module, compiled(module, AGAIN), x, g) <= 1
    assert all(report.segments for report in tiled)
    assert "calls_below(" in records[-1].backward_source  # outside of the tiles: it has no rows of the batch
    assert "calls_with_room(" not in records[-1].backward_source  # inside
