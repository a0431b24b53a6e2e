"""Linears with adapters: outputs and every gradient against float64, in units of eager's own error."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fxfuse.reporting.records import GraphRecord
from fxfuse.validation import error_ratio
from tests.adapted_modules import Adapted, Attentionlike, GatedMLP, Kinds, compiled, ratios, sites, step

BF16, FP32 = torch.bfloat16, torch.float32
KINDS = {
    "bf16": Kinds(),
    "bf16, trained base": Kinds(trained_base=True),
    "fp32": Kinds(FP32, FP32),
    "fp32, trained base": Kinds(FP32, FP32, trained_base=True),
    "fp32 adapters, autocast": Kinds(BF16, FP32, autocast=True),
    "fp32 model, autocast": Kinds(FP32, FP32, autocast=True),
    "fp32 adapters": Kinds(BF16, FP32),
}
# The root mean squares of a few hundred rounding errors scatter.
SLACK = 1.15
LIMIT = {BF16: 2.0, FP32: 1.5}


def right(found: dict[str, float], kinds: Kinds) -> None:
    bad = {name: ratio for name, ratio in found.items() if ratio > SLACK * LIMIT[kinds.model]}
    assert not bad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [Attentionlike, GatedMLP])
def test_every_gradient(make: type, kind: str, records: list[GraphRecord]) -> None:
    kinds = KINDS[kind]
    right(ratios(make(casts=kinds.adapters != kinds.model), kinds), kinds)
    assert len(sites(records[0], "lora_linear")) == (4 if make is Attentionlike else 3)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_other_magnitudes(scale: float) -> None:
    right(ratios(Attentionlike(), Kinds(), scale=scale), Kinds())


@pytest.mark.parametrize("options", [
    dict(dropout=0.2), dict(bias=True), dict(scales=(2.0, 0.3)), dict(scales=(1.7,)), dict(rank=3), dict(scales=(-0.5,)),
    dict(dropout=0.1, bias=True, scales=(0.7, 1.1, 3.0), rank=5),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", [
    "bf16", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "bf16"),
])
def test_variants(options: dict, kind: str, records: list[GraphRecord]) -> None:
    kinds = KINDS[kind]
    right(ratios(Attentionlike(casts=kinds.adapters != kinds.model, **options), kinds), kinds)
    assert len(sites(records[0], "lora_linear")) == 4 * len(options.get("scales", (1,)))


def test_one_linear(records: list[GraphRecord]) -> None:
    right(ratios(Adapted(64, 96, bias=True), Kinds(trained_base=True)), Kinds())
    assert records[0].sites[0].implementation == "addmm_"


@pytest.mark.parametrize("rows", [(40,), (2, 3, 20)])
def test_any_number_of_leading_dimensions(rows: tuple[int, ...]) -> None:
    right(ratios(GatedMLP(), Kinds(), rows=rows), Kinds())


def test_frozen_adapters() -> None:
    module = Kinds().prepare(Attentionlike())
    module.requires_grad_(False)
    exact, plain = copy.deepcopy(module).double(), copy.deepcopy(module)
    x = torch.randn(2, 30, 64).to(BF16)
    truth, eager, ours = step(exact, exact, x.double(), False), step(plain, plain, x, False), step(compiled(module), module, x, False)
    assert set(ours) == {"output", "x"}
    assert all(error_ratio(ours[name], eager[name], truth[name]) < SLACK * 2 for name in ours)


def scaled_wrongly(module: nn.Module) -> None:
    for part in (module.q, module.o):
        part.scales = (2.1,)


def without_mask(module: nn.Module) -> None:
    module.v.drop = nn.Identity()


def transposed(module: nn.Module) -> None:
    """B read the wrong way round: the same numbers in the other order."""
    b = module.q.lora_B[0].weight
    b.data = b.data.t().reshape(b.shape).clone()


def stale(module: nn.Module) -> None:
    """An adapter as it was before the last update."""
    a = module.k.lora_A[0].weight
    a.data = a.data + 0.2 * torch.randn_like(a)


@pytest.mark.parametrize("fault", [scaled_wrongly, without_mask, transposed, stale], ids=lambda fault: fault.__name__)
def test_planted_faults_are_seen(fault: Callable[[nn.Module], None]) -> None:
    found = ratios(Attentionlike(dropout=0.1), Kinds(), fault=fault)
    assert found["output"] > 2 * SLACK
    assert max(ratio for name, ratio in found.items() if "lora_A" in name) > 2 * SLACK
