"""The contract of lazy logits as a list of what it promises, and faults that break each."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxfuse.errors import OutputContractError
from fxfuse.output_contract import source, tensor
from fxfuse.output_contract import stamp as stamps
from fxfuse.output_contract.tensor import LazyTensor
from tests.model import giving_up
from tests.model.lazy_heads import Cube, Model, gradients, lazy, recording, tokens  # noqa: F401


def complaints() -> list[str]:
    """What the contract promises and does not hold."""
    found = []
    model, eager = lazy(), Model()
    loss, logits = model(tokens())
    want = eager(tokens())[1]
    got = [p.grad for p in backwards(model, logits.square().sum())]
    if not all(a is not None and torch.equal(a, b.grad) for a, b in zip(got, backwards(eager, want.square().sum()), strict=True)):
        found.append("gradient")
    if not all(map(torch.equal, gradients(model, Cube.apply(model(tokens())[1])), gradients(eager, Cube.apply(eager(tokens())[1])))):
        found.append("gradient through a function")
    model.hidden.clear()
    model.history.clear()
    kept = [model(tokens())[1] for _ in range(2)]
    gc.collect()
    if model.hidden[0]() is not None:
        found.append("held")
    if model.history[0]() is not None:
        found.append("history held")
    try:
        with torch.no_grad():
            model.lm_head.weight.mul_(2)
        kept[1].sum()
        found.append("stale")
    except OutputContractError:
        pass
    loss, logits = model(tokens())
    backwards(model, loss)
    torch.optim.AdamW(model.parameters(), 0.1, fused=True).step()
    try:
        logits.sum()
        found.append("stale after a fused step")
    except OutputContractError:
        pass
    return found


def backwards(model: Model, loss: Tensor) -> list[nn.Parameter]:
    model.zero_grad()
    loss.backward()
    return list(model.parameters())


def detached_weights(self: Any) -> tuple:
    return tuple(v.detach() if isinstance(v, nn.Parameter) else v for v in ORIGINAL_INPUTS(self))


def close_on_forward_alone(self: Any, reason: str) -> None:
    if reason == source.NEXT_FORWARD:
        ORIGINAL_CLOSE(self, reason)


ORIGINAL_CLOSE = source.Source.close
ORIGINAL_INPUTS = source.Source.inputs

FORWARD = giving_up.FilledOutputs.__call__.__globals__
FAULTS: dict[str, tuple[str, list[tuple[Any, str, Any]]]] = {
    "weights are not looked at": ("stale", [(source, "stamp", lambda value: None)]),
    "only versions are looked at, and no optimizer": (
        "stale after a fused step",
        [(stamps, "sample_of", lambda value: torch.empty(0)), (source.Source, "close", close_on_forward_alone)],
    ),
    "the former forward is not let go": ("held", [(FORWARD, "next_forward", lambda owner: None)]),
    "autograd history stays": ("history held", [(LazyTensor, "forget", lambda self: None)]),
    "the weight is detached": ("gradient", [(source.Source, "inputs", detached_weights)]),
    "functions get no gradient": ("gradient through a function", [(tensor, "differentiable", lambda values: [])]),
}


def test_the_contract_holds() -> None:
    assert complaints() == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, patches = FAULTS[fault]
    for where, name, value in patches:
        monkeypatch.setitem(where, name, value) if isinstance(where, dict) else monkeypatch.setattr(where, name, value)
    try:
        found = complaints()
    except RuntimeError as error:  # "does not require grad"
        found = [f"gradient through a function: {error}", "gradient"]
    assert any(each.startswith(seen) for each in found)
