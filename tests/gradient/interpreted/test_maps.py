"""Gates with adapters around them, whole modules in Triton's interpreter: gradients against float64, and what became one call."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

import fxfuse.bufferize as bufferize
from fxfuse.reporting.records import GraphRecord
from tests.adapted_modules import GatedMLP, Kinds, ratios

BF16, FP32 = torch.bfloat16, torch.float32
KINDS = {
    "bf16": Kinds(),
    "fp32 adapters, autocast": Kinds(BF16, FP32, autocast=True),
    "fp32 adapters": Kinds(BF16, FP32),
    "trained base": Kinds(trained_base=True),
}
LIMIT = 2.0 * 1.15  # the root mean squares of a few hundred rounding errors scatter


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for, and on a CPU, whose kernels are interpreted, too."""
    monkeypatch.setenv("FXFUSE_THIN_MAPS", "1")
    monkeypatch.setattr(bufferize, "_is_on_gpu", lambda node: True)


def calls(source: str) -> list[str]:
    return re.findall(r"fxfuse_thin_map\((.*)\);", source)


@pytest.mark.parametrize("kind", [
    "bf16", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "bf16"),
])
def test_every_gradient(kind: str, records: list[GraphRecord]) -> None:
    kinds = KINDS[kind]
    found = ratios(GatedMLP(casts=kinds.adapters != kinds.model), kinds, validate="off")
    assert max(found.values()) <= LIMIT, found
    forward, backward = calls(records[0].forward_source), calls(records[0].backward_source)
    assert len(forward) == len(backward) == 1
    assert forward[0].endswith("], [], [], []")  # the terms of gate and up, as they are loaded


def test_nothing_is_one_call_unasked(records: list[GraphRecord], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FXFUSE_THIN_MAPS")
    ratios(GatedMLP(), Kinds(), validate="off")
    assert not calls(records[0].forward_source)
    assert not calls(records[0].backward_source)


class TwiceRead(GatedMLP):
    """The gate's product is read by the next linear and by the sum of the whole."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        z = nn.functional.silu(self.gate(y)) * self.up(y)
        return x + self.down(z) + z[..., : x.shape[-1]]


class Scaled(GatedMLP):
    """What is computed between the linears is no map: a norm of the gate."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        gate = self.gate(y)
        return x + self.down(nn.functional.rms_norm(gate, gate.shape[-1:]) * self.up(y))


@pytest.mark.parametrize(("make", "count"), [(TwiceRead, 1), (Scaled, 0)])
def test_near_misses(make: type, count: int, records: list[GraphRecord]) -> None:
    found = ratios(make(), Kinds(), validate="off")
    assert max(found.values()) <= LIMIT, found
    assert len(calls(records[0].backward_source)) == count


@pytest.mark.slow
def test_high_ranks_stay_apart(records: list[GraphRecord]) -> None:
    """Their sums would not stay in registers."""
    found = ratios(GatedMLP(256, 512, rank=40), Kinds(), width=256, validate="off")
    assert max(found.values()) <= LIMIT, found
    assert not calls(records[0].backward_source)


def test_a_spoiled_adapter_is_seen() -> None:
    def spoil(module: nn.Module) -> None:
        module.up.lora_B[0].weight.data *= 1.1

    assert max(ratios(GatedMLP(), Kinds(), fault=spoil, validate="off").values()) > LIMIT
