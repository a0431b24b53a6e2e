"""Blocks that ``fully_shard`` manages are captured as they are without it: the same sites, also around 4-bit weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.capture import device_memory
from tests.model import builders as build
from tests.model.builders import tokens
from tests.model.quantized_models import in_4bit, with_adapters

OPTIONS = {"validate": "off", "remainder": "eager", "strict": True}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "lora": lambda: build.with_lora(build.llama(1)),
    "qlora": lambda: with_adapters(in_4bit(build.llama(1), quant_storage=torch.float32)),
}


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.items()}


def counts(model: nn.Module) -> dict[str, int]:
    return {site.rule: fxfuse.report(model).count(site.rule) for site in fxfuse.report(model).sites}


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("name", MODELS)
def test_the_same_sites_as_without_shards(name: str) -> None:
    """Also after steps before sharding, whose graphs are there already."""
    model, eager = fxfuse.optimize(MODELS[name](), **OPTIONS), MODELS[name]()
    model(**tokens())["loss"].backward()
    plain = counts(model)
    model.zero_grad(set_to_none=True)
    fxfuse.restore(model)
    fxfuse.optimize(model, **OPTIONS)
    sharded(model)
    for seed in range(2):
        ours, theirs = model(**tokens(seed=seed))["loss"], eager(**tokens(seed=seed))["loss"]
        ours.backward()
        theirs.backward()
        assert abs(ours - theirs) <= 2e-5 * theirs
    assert counts(model) == plain
    assert plain["rope"] == 2
    assert plain.get("nf4_linear", 7) == 7
    report = fxfuse.report(model)
    assert not report.errors
    assert not [note for note in report.notes if "eager" in note]
    want = gradients(eager)
    assert gradients(model).keys() == want.keys()
    for path, value in gradients(model).items():
        assert (value - want[path]).norm() <= 2e-5 * want[path].norm(), path


@pytest.mark.usefixtures("group")
def test_a_memory_budget_counts_the_shard_that_lies_here() -> None:
    model = sharded(build.with_lora(build.llama(1)))
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    readings = device_memory.read(model, torch.device("cpu"))
    assert readings.weights == pytest.approx(whole, rel=0.05)  # one shard of one; and rotary frequencies
