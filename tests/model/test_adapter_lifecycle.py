"""Adapters come, go, are switched, merged and replaced after ``optimize``: each state is right, is captured once, and going back to a
state that was there before compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import fxfuse
from tests.model import builders as build
from tests.model.builders import CAPTURED, PassThrough, differences, step, tokens

LINEARS = ["q_proj", "v_proj"]


@pytest.fixture(autouse=True)
def pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs run unchanged, bit for bit as eager: this is about which there are."""
    CAPTURED.clear()
    monkeypatch.setattr("fxfuse.api._backend", lambda *options: PassThrough())


def config(**changes: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEARS, "init_lora_weights": False, **changes})


def adapted(**changes: Any) -> nn.Module:
    from peft import get_peft_model

    torch.manual_seed(1)
    return get_peft_model(build.llama(), config(**changes)).train()


@dataclass
class Twins:
    """The same model twice, one of them optimized; each change is made to both, each step compared bit for bit."""

    model: nn.Module
    eager: nn.Module

    def after(self, change: Callable[[nn.Module], Any] = lambda model: None) -> int:
        """Graphs that a step compiles after ``change``."""
        before = len(CAPTURED.get("", ()))
        for model in (self.model, self.eager):
            torch.manual_seed(2)
            change(model)
        for seed in (0, 1):
            assert differences(step(self.model, tokens(seed=seed)), step(self.eager, tokens(seed=seed))) == []
        assert fxfuse.report(self.model).errors == []
        assert not any("ran eager" in note or "is not captured" in note for note in fxfuse.report(self.model).notes)
        return len(CAPTURED[""]) - before


def twins(make: Callable[[], nn.Module] = adapted) -> Twins:
    return Twins(fxfuse.optimize(make()), make())


def disable(model: nn.Module) -> None:
    model.base_model.disable_adapter_layers()


def enable(model: nn.Module) -> None:
    model.base_model.enable_adapter_layers()


def merge(model: nn.Module) -> None:
    model.merge_adapter()


def unmerge(model: nn.Module) -> None:
    model.unmerge_adapter()


def train_embeddings(model: nn.Module) -> None:
    """So that every state has something to train, and all blocks get an input with a gradient."""
    model.get_input_embeddings().weight.requires_grad_()


def with_embeddings(**changes: Any) -> nn.Module:
    model = adapted(**changes)
    train_embeddings(model)
    return model


def test_disabled_and_enabled() -> None:
    both = twins(with_embeddings)
    assert both.after() == 3  # block, norm, head
    assert both.after(disable) == 1
    assert [both.after(change) for change in (enable, disable, enable)] == [0, 0, 0]


def test_disabled_for_one_call() -> None:
    both = twins(with_embeddings)
    both.after()

    def reference(model: nn.Module) -> None:
        """What preference trainers do in every step."""
        with torch.no_grad(), model.disable_adapter():
            model(**tokens())
        with model.disable_adapter():
            model(**tokens())["loss"].backward()

    assert both.after(reference) == 2  # without the adapter, with gradients and without
    assert [both.after(reference) for _ in range(2)] == [0, 0]


def test_merged_and_taken_out_again() -> None:
    both = twins(with_embeddings)
    both.after()
    assert both.after(merge) == 1
    assert [both.after(change) for change in (unmerge, merge, unmerge)] == [0, 0, 0]


def test_a_second_adapter_added_after_optimize() -> None:
    both = twins(with_embeddings)
    both.after()

    def add(model: nn.Module) -> None:
        model.add_adapter("second", config(r=2))

    def second(model: nn.Module) -> None:
        model.set_adapter("second")
        train_embeddings(model)

    def first(model: nn.Module) -> None:
        model.set_adapter("default")
        train_embeddings(model)

    assert both.after(add) == 1  # the layers hold one module more
    assert both.after(second) == 1
    # From the first switch on, the layers share one list of names; until then each had its own, and Dynamo guards that.
    assert both.after(first) <= 1
    assert [both.after(change) for change in (second, first, second)] == [0, 0, 0]


def test_two_adapters_at_once() -> None:
    def make() -> nn.Module:
        model = with_embeddings()
        model.add_adapter("second", config(r=2))
        return model

    def chosen(names: list[str]) -> Callable[[nn.Module], None]:
        def choose(model: nn.Module) -> None:
            model.base_model.set_adapter(names)
            train_embeddings(model)

        return choose

    both = twins(make)
    both.after()
    assert both.after(chosen(["default", "second"])) == 1
    assert both.after(chosen(["second"])) == 1
    assert [both.after(chosen(names)) for names in (["default", "second"], ["default"], ["second"])] == [0, 0, 0]


def test_adapters_replaced() -> None:
    both = twins(with_embeddings)
    both.after()

    def replace(model: nn.Module) -> None:
        model.delete_adapter("default")
        model.add_adapter("default", config())
        model.set_adapter("default")
        train_embeddings(model)

    assert both.after(replace) <= 1
    assert both.after() == 0


def test_adapters_added_to_an_optimized_model() -> None:
    from peft import get_peft_model

    both = twins(build.llama)
    assert both.after() == 3
    for name in ("model", "eager"):
        torch.manual_seed(1)
        setattr(both, name, get_peft_model(getattr(both, name), config()).train())
        train_embeddings(getattr(both, name))
    assert both.after() in (1, 3)  # blocks; the rest where freezing its weights is another graph
    assert [both.after(disable), both.after(enable)] == [1, 0]


def test_unloaded_and_gone() -> None:
    both = twins(with_embeddings)
    both.after()
    both.model, both.eager = both.model.merge_and_unload(), both.eager.merge_and_unload()
    assert both.after(train_embeddings) == 1
    assert both.after() == 0


def test_a_trained_copy_of_the_head() -> None:
    both = twins(lambda: with_embeddings(modules_to_save=["lm_head"]))
    assert both.after() == 3
    assert both.after(disable) in (1, 2)  # block, and the head with its own weights
    assert [both.after(change) for change in (enable, disable, enable)] == [0, 0, 0]


def test_adapters_on_the_head() -> None:
    both = twins(lambda: with_embeddings(target_modules=[*LINEARS, "lm_head"]))
    assert both.after() == 3
    assert both.after(disable) == 2
    assert both.after(enable) == 0
    assert both.after(merge) == 2
    assert [both.after(change) for change in (unmerge, merge, unmerge)] == [0, 0, 0]


def test_training_and_evaluation_with_dropout() -> None:
    both = twins(lambda: with_embeddings(lora_dropout=0.5))
    both.after()
    assert both.after(lambda model: model.eval()) == 1
    assert [both.after(lambda model: model.train()), both.after(lambda model: model.eval())] == [0, 0]


def test_a_rank_and_a_scale_of_its_own_for_each_state_are_constants_of_its_graph() -> None:
    """Scaling is a number in the module: another one is another graph, and each is right."""
    both = twins(with_embeddings)
    both.after()

    def scale(factor: float) -> Callable[[nn.Module], None]:
        def change(model: nn.Module) -> None:
            for module in model.modules():
                if hasattr(module, "set_scale"):
                    module.set_scale("default", factor)

        return change

    assert both.after(scale(3.0)) == 1
    assert [both.after(scale(1.0)), both.after(scale(3.0))] == [0, 0]


def test_frozen_and_thawed() -> None:
    def frozen(names: str, wanted: bool) -> Callable[[nn.Module], None]:
        def change(model: nn.Module) -> None:
            for name, parameter in model.named_parameters():
                if names in name:
                    parameter.requires_grad_(wanted)

        return change

    both = twins(with_embeddings)
    both.after()
    assert both.after(frozen("lora_A", False)) == 1
    assert [both.after(frozen("lora_A", True)), both.after(frozen("lora_A", False))] == [0, 0]
    assert both.after(frozen("lora_B", False)) == 1


def test_thawed_after_the_first_step() -> None:
    """What was frozen when its graph was made has a gradient as soon as it wants one."""
    both = twins(with_embeddings)
    for model in (both.model, both.eager):
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)
    both.after()

    def thaw(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(True)

    assert both.after(thaw) == 1
