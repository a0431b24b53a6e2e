"""A QLoRA model under a budget that has room for its weights as numbers: the same gradients, and no memory held when it is over."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse import kept_weights
from fxfuse.capture.governor import Governor
from fxfuse.memory.planner import Problem
from tests.model.builders import VOCABULARY, llama
from tests.model.quantized_models import in_4bit, with_adapters

OPTIONS: dict[str, Any] = dict(remainder="eager", validate="off", strict=True)


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The device counts as one whose allocator is known; the budget is what stands here."""
    budget = [1 << 30]
    problem = Governor.problem

    def as_on_a_gpu(self: Governor, *args: Any, **kwargs: Any) -> Problem:
        found = problem(self, *args, **kwargs)
        found.saved_only = False
        return found

    monkeypatch.setattr(Governor, "problem", as_on_a_gpu)
    monkeypatch.setattr(Governor, "_limit", lambda self, readings: (budget[0], 0))
    torch.use_deterministic_algorithms(True)  # sums are rounded alike under every plan
    yield budget
    torch.use_deterministic_algorithms(False)
    gc.collect()
    assert not kept_weights.WANTED


def _model() -> nn.Module:
    torch.manual_seed(0)
    model = with_adapters(in_4bit(llama(2)))
    return fxfuse.optimize(model, memory=1 << 30, **OPTIONS)


def _step(model: nn.Module, length: int = 24) -> list[Tensor]:
    ids = torch.randint(0, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def _held() -> int:
    return sum(entry.weight is not None for entry in kept_weights.WANTED.values())


def test_gradients_are_the_same_and_weights_stay(limit: list[int]) -> None:
    model = _model()
    expected = _step(model)
    assert not kept_weights.WANTED
    for _ in range(2):  # seven linears in each of two blocks, from the planned step on
        assert all(map(torch.equal, _step(model), expected))
        assert _held() == 14
    plan = fxfuse.report(model).memory
    assert plan.kept_weights == plan.parts["dequantized weights"] == sum(
        entry.weight.numel() * entry.weight.itemsize for entry in kept_weights.WANTED.values() if entry.weight is not None)
    assert "dequantized weights" in str(fxfuse.report(model))
    with torch.no_grad():  # evaluation between steps finds them too
        model(input_ids=torch.zeros(1, 8, dtype=torch.long))
    assert _held() == 14
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.up_proj.base_layer")
    with torch.no_grad():
        layer.weight.copy_(layer.weight.roll(7, 0))
    assert not all(map(torch.equal, _step(model), expected))
    old, place = layer.weight, kept_weights.place_of(layer.weight)
    layer.weight = type(old)(old.data.roll(-7, 0), requires_grad=False, quant_state=old.quant_state, bnb_quantized=True)
    assert all(map(torch.equal, _step(model), expected))
    for _ in range(16):
        _step(model)
    assert place not in kept_weights.WANTED
    assert _held() == 13
    fxfuse.restore(model)
    assert not kept_weights.WANTED


def test_a_longer_batch_takes_the_memory_back_and_a_model_that_goes(limit: list[int]) -> None:
    model = _model()
    _step(model)
    _step(model)
    assert _held() == 14
    limit[0] = 1
    _step(model, 128)
    assert not kept_weights.WANTED
    limit[0] = 1 << 30
    _step(model, 192)
    assert _held() == 14
    del model
    gc.collect()
    assert not kept_weights.WANTED
