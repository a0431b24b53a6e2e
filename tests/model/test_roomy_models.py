"""Adapted models whose frozen weights have room: who merges, casts, thaws, shards or swaps adapters finds what was always there."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.backend import Backend
from fxfuse.capture import rooms
from fxfuse.capture.install import Installation
from fxfuse.capture.rooms import Rooms
from fxfuse.reporting.records import GraphRecord
from tests.model import builders as build
from tests.model.roomy import (
    CONFIG,
    adapted,
    everywhere,
    frozen,
    moved,
    peft,
    right,
    same,
    trained,
    unmoved,
    values,
)
from tests.model.test_lora_models import fill, judged, step

__all__ = ["everywhere"]


def test_a_step_is_right_and_the_report_says_how() -> None:
    model = adapted()
    truth, eager = step(copy.deepcopy(model).double(), build.tokens()), step(copy.deepcopy(model), build.tokens())
    before = values(model)
    fxfuse.optimize(model, strict=True, remainder="eager")
    judged(step(model, build.tokens()), eager, truth)
    assert moved(model) == 14
    assert same(values(model), before)
    report = fxfuse.report(model)
    assert "augmented" in {site.implementation for site in report.named("lora_linear")}
    assert any("the frozen weights of 14 linears lie in rows with room" in note for note in report.notes)


def test_a_tight_budget_has_nothing_to_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    installation = Installation(nn.Linear(2, 2), Backend())
    assert installation._has_memory(10**12)
    budget = SimpleNamespace(resolve=lambda device, allocated: 1000)
    installation.governor = SimpleNamespace(device=torch.device("cuda"), budget=budget)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 360)
    assert installation._has_memory(19)
    assert not installation._has_memory(20)


def test_where_there_is_no_memory_weights_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def full(weight: nn.Parameter, room: int) -> None:
        calls.append(room)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(rooms, "move", full)
    model = fxfuse.optimize(adapted(), strict=True, remainder="eager")
    right(model)
    assert unmoved(model)
    assert len(calls) == 1


def test_graphs_are_found_by_another_model(records: list[GraphRecord]) -> None:
    """Its weights are moved before the guards of what the first one compiled look at them."""
    trained()
    made = len(records)
    second = trained()
    step(second, build.tokens())
    assert len(records) == made


def test_restored_exactly() -> None:
    model = adapted()
    before, objects = values(model), {name: id(p) for name, p in model.named_parameters()}
    fxfuse.restore(trained(model))
    assert unmoved(model)
    assert same(values(model), before)
    assert {name: id(p) for name, p in model.named_parameters()} == objects
    assert not any(module._state_dict_pre_hooks for module in model.modules())


def test_off_where_nobody_asks_or_graphs_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    for options in (dict(exclude=("lora_linear",)), dict(rules=("rms_norm",)), dict(cuda_graphs=True)):
        Rooms(Backend(**options), lambda more: True).prepare([model], model)
        assert moved(model) == 0
    Rooms(Backend(), lambda more: more < 1000).prepare([model], model)  # a budget with nothing to spare
    assert moved(model) == 0
    monkeypatch.setenv(rooms.SETTING, "0")
    model = fxfuse.optimize(adapted(), remainder="eager")
    step(model, build.tokens())
    assert moved(model) == 0


def test_merged_and_taken_out_again() -> None:
    """To the bit as without room: a sum of 16-bit numbers that is taken back is not what it was, in either."""
    model = trained()
    plain = frozen(other := copy.deepcopy(model))
    for each in (model, other):
        each.merge_adapter()
        each.unmerge_adapter()
    assert all(torch.equal(p, plain[name]) for name, p in frozen(model).items())
    right(model)


def test_cast() -> None:
    model = trained()
    right(model, lambda m: m.float())
    assert unmoved(model)


def test_thawed_and_frozen_again() -> None:
    model = trained()
    thawed = "base_model.model.model.layers.1.mlp.gate_proj.base_layer.weight"
    right(model, lambda m: m.get_parameter(thawed).requires_grad_(True))
    weight = model.get_parameter(thawed)
    assert weight.grad is not None
    assert weight.is_contiguous()
    assert moved(model) == 13
    weight.grad = None
    right(model, lambda m: m.get_parameter(thawed).requires_grad_(False))
    assert moved(model) == 14


def test_evaluated_between_steps() -> None:
    model, batch = trained(), build.tokens()
    plain = fxfuse.restore(copy.deepcopy(model))
    for one in (model, plain):
        one.eval()
    with torch.no_grad():
        ours, eager = model(**batch).logits, plain(**batch).logits
    assert torch.equal(ours, eager)
    assert torch.equal(model.generate(batch["input_ids"], max_new_tokens=3, do_sample=False),
                       plain.generate(batch["input_ids"], max_new_tokens=3, do_sample=False))  # fmt: skip
    model.train()
    right(model)


@pytest.mark.slow
def test_two_adapters_one_weight() -> None:
    """Another adapter in the same room; one that needs more than there is goes as without."""
    model = trained()

    def second(m: nn.Module, rank: int, name: str) -> None:
        torch.manual_seed(5)
        m.add_adapter(name, peft.LoraConfig(**{**CONFIG, "r": rank}))
        for path, parameter in m.named_parameters():
            if f".{name}." in path:
                parameter.data = parameter.data.bfloat16()
        fill(m)
        m.set_adapter(name)

    right(model, lambda m: second(m, 8, "same"))
    right(model, lambda m: m.set_adapter("default"))
    right(model, lambda m: second(m, 16, "larger"))
    right(model, lambda m: m.set_adapter("same"))
    assert moved(model) == 14


@pytest.mark.slow
def test_checkpointed_and_accumulated() -> None:
    model = trained()
    right(model, lambda m: m.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}))
    plain, batches = fxfuse.restore(copy.deepcopy(model)), [build.tokens(seed=s) for s in (3, 4)]
    for one in (model, plain):
        one.zero_grad()
        for batch in batches:
            one(**batch).loss.backward()
    ours = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).float()
    eager = torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None]).float()
    assert (ours - eager).norm() < 0.02 * eager.norm()


def test_parametrized_after_a_step() -> None:
    """Its weight is no parameter any more."""
    def change(model: nn.Module) -> None:
        nn.utils.parametrizations.weight_norm(model.base_model.model.model.layers[0].mlp.down_proj.base_layer)

    right(trained(), change)


def test_whose_weight_is_left_alone() -> None:
    """Each of these keeps one weight of the model where it is."""
    model = adapted()
    first, second = model.base_model.model.model.layers
    hooked, replaced = first.mlp.gate_proj.base_layer, first.mlp.up_proj.base_layer
    hooked.register_forward_hook(lambda module, args, out: None)
    replaced.forward = lambda x: nn.functional.linear(x, replaced.weight)
    parametrized = nn.utils.parametrizations.weight_norm(first.mlp.down_proj.base_layer)
    tied = (first.self_attn.k_proj.base_layer, second.self_attn.k_proj.base_layer)
    tied[1].weight = tied[0].weight
    held = second.mlp.gate_proj.base_layer.weight.data
    part = second.mlp.up_proj.base_layer.weight
    part.data = torch.cat([part.data, part.data])[: len(part)]
    alone = [hooked.weight, replaced.weight, tied[0].weight, second.mlp.gate_proj.base_layer.weight, part]
    places = [(w.data_ptr(), w.stride()) for w in alone]
    fxfuse.optimize(model, remainder="eager")
    step(model, build.tokens())
    assert [(w.data_ptr(), w.stride()) for w in alone] == places
    assert all(p.is_contiguous() for p in parametrized.parameters())
    assert moved(model) == 14 - 6 - 1  # (the tied one is one parameter)
    assert held.is_contiguous()


def test_data_parallel(group: None) -> None:
    """Wrapped after steps with room, and before the first one."""
    model = trained()
    wrapped = nn.parallel.DistributedDataParallel(model)
    step(wrapped, build.tokens())
    assert moved(model) == 14
    fresh = fxfuse.optimize(adapted(), strict=True, remainder="eager")
    step(nn.parallel.DistributedDataParallel(fresh), build.tokens())
    assert moved(fresh) == 14


def test_sharded(group: None) -> None:
    """FSDP2's weights are never moved; sharding a model that has trained takes ``restore`` first, and torch says that it must."""
    from torch.distributed.fsdp import fully_shard

    model = fxfuse.optimize(adapted(), remainder="eager")
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    step(model, build.tokens())
    assert moved(model) == 0
    model = trained()
    layer = model.base_model.model.model.layers[0]
    with pytest.raises(NotImplementedError, match="contiguous"):
        fully_shard(layer)
    fxfuse.restore(model)
    fully_shard(model.base_model.model.model.layers[1])
    step(model, build.tokens())
