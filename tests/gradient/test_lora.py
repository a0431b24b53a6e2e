"""Linears with adapters: outputs and every gradient against float64, in units of eager's own error."""

from __future__ import annotations

import pytest
import torch

import fxfuse.backend as backend
from fxfuse.reporting.records import GraphRecord
from tests.adapted_modules import Adapted, Attentionlike, GatedMLP, Kinds, ratios, sites

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


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> list[GraphRecord]:
    made: list[GraphRecord] = []
    original = backend.new_record

    def keep() -> GraphRecord:
        made.append(original())
        return made[-1]

    monkeypatch.setattr(backend, "new_record", keep)
    return made


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


def test_frozen_adapters_and_no_grad() -> None:
    module = Kinds().prepare(Attentionlike())
    module.requires_grad_(False)
    from tests.adapted_modules import compiled

    x = torch.randn(2, 30, 64).to(BF16)
    run, exact = compiled(module), None
    eager = module(x)
    import copy

    from fxfuse.validation import error_ratio

    exact = copy.deepcopy(module).double()(x.double())
    assert error_ratio(run(x), eager, exact) < 2
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    run(a).float().square().sum().backward()
    module(b).float().square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=0.1, atol=0.1 * float(b.grad.abs().max()))
