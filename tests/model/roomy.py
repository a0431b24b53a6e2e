"""A tiny adapted model whose frozen weights are moved to where they have room (capture/rooms.py), on this device and at any size."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse.capture import rooms
from fxfuse.products import augmented
from fxfuse.roomy_weights import home_of
from tests.model import builders as build
from tests.model.test_lora_models import fill, judged, step

peft = pytest.importorskip("peft")
CONFIG = dict(r=8, lora_alpha=16, target_modules="all-linear")


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are moved on this device too, and sums are augmented at any size. (Tests import it.)"""
    monkeypatch.setattr(rooms, "DEVICES", ("cpu",))
    monkeypatch.setattr(augmented, "LEAST", 0)
    monkeypatch.setenv(rooms.SETTING, "1")


def adapted(**options: Any) -> nn.Module:
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(build.llama().bfloat16(), peft.LoraConfig(**{**CONFIG, **options}), autocast_adapter_dtype=False)
    fill(wrapped)
    return wrapped.train()


def frozen(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapted weights."""
    return {name: p for name, p in model.named_parameters() if "base_layer.weight" in name}


def moved(model: nn.Module) -> int:
    return sum(home_of(p) is not None for p in frozen(model).values())


def trained(model: nn.Module | None = None) -> nn.Module:
    """An optimized model that has taken a step, with all its adapted weights moved."""
    model = adapted() if model is None else model
    fxfuse.optimize(model, strict=True, remainder="eager")
    step(model, build.tokens())
    assert moved(model) == len(frozen(model)) == 14
    return model


def right(model: nn.Module, change: Callable[[nn.Module], Any] = lambda model: None) -> None:
    """After a change of the model its gradients are eager's."""
    plain = fxfuse.restore(copy.deepcopy(model))
    change(plain)
    change(model)
    truth, eager = step(copy.deepcopy(plain).double(), build.tokens()), step(plain, build.tokens())
    judged(step(model, build.tokens()), eager, truth)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def unmoved(model: nn.Module) -> bool:
    """Does every weight lie contiguous, alone in a storage of its size."""
    return all(p.is_contiguous() and p.untyped_storage().nbytes() == p.nbytes for p in frozen(model).values())
