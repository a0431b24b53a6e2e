"""Adapters in any order: a state machine changes an optimized model and a plain twin alike, and compares them after every change.

Graphs run unchanged here, bit for bit as eager (tests/model/test_adapter_lifecycle.py counts them): this is about which parameters,
flags and adapters a captured model sees after each of PEFT's operations.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

import fxfuse
from tests.model import builders as build
from tests.model.builders import PassThrough, differences, step, tokens

NAMES = ("first", "second", "third")
TARGETS = (["q_proj", "v_proj"], ["q_proj", "down_proj"])


def config(rank: int, targets: list[str], trained_head: bool) -> Any:
    from peft import LoraConfig

    saved = {"modules_to_save": ["lm_head"]} if trained_head else {}
    return LoraConfig(r=rank, lora_alpha=8, target_modules=targets, init_lora_weights=False, **saved)


class Adapters(RuleBasedStateMachine):
    """``models``: the optimized one, and the one that is left alone. Every rule does the same to both."""

    def both(self, change: Callable[[nn.Module], Any]) -> None:
        self.seed += 1
        for model in self.models:
            torch.manual_seed(self.seed)
            change(model)

    @initialize(before=st.booleans(), trained_head=st.booleans(), dropout=st.sampled_from([0.0, 0.5]))
    def make(self, before: bool, trained_head: bool, dropout: float) -> None:
        """Optimized before the first adapter comes, or after."""
        from peft import get_peft_model

        self.seed, self.merged, self.trained_head = 0, False, trained_head
        self.models: list[nn.Module] = [build.llama(1), build.llama(1)]
        if before:
            self.optimize()
        first = config(4, TARGETS[0], trained_head)
        first.lora_dropout = dropout
        for i, model in enumerate(self.models):
            torch.manual_seed(1)
            self.models[i] = get_peft_model(model, first, adapter_name=NAMES[0]).train()
        if not before:
            self.optimize()

    def optimize(self) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fxfuse.api._backend", lambda *options: PassThrough())
            fxfuse.optimize(self.models[0])

    @property
    def names(self) -> list[str]:
        return sorted(self.models[0].peft_config)

    @precondition(lambda self: not self.merged and len(self.names) < len(NAMES))
    @rule(rank=st.sampled_from([2, 4]), layers=st.sampled_from(TARGETS))
    def add(self, rank: int, layers: list[str]) -> None:
        name = next(name for name in NAMES if name not in self.names)
        self.both(lambda model: model.add_adapter(name, config(rank, layers, self.trained_head)))

    @precondition(lambda self: not self.merged)
    @rule(data=st.data())
    def switch(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.names))
        self.both(lambda model: model.set_adapter(name))

    @precondition(lambda self: not self.merged and len(self.names) > 1)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.names))
        rest = next(other for other in self.names if other != name)
        self.both(lambda model: model.set_adapter(rest))
        self.both(lambda model: model.delete_adapter(name))

    @precondition(lambda self: not self.merged and not self.trained_head and 2 <= len(self.names) < len(NAMES))
    @rule()
    def weigh(self) -> None:
        name = next(name for name in NAMES if name not in self.names)
        pair = self.names[:2]

        def weighted(model: nn.Module) -> None:
            model.add_weighted_adapter(pair, [0.7, 0.4], name, combination_type="cat")
            model.set_adapter(name)

        self.both(weighted)

    @rule()
    def disable_for_a_while(self) -> None:
        """What preference trainers do: the base as a reference, in the middle of a step."""

        def reference(model: nn.Module) -> torch.Tensor:
            with torch.no_grad(), model.disable_adapter():
                return model(**tokens())["logits"]

        if not self.merged:  # (disabled, merged adapters are unmerged)
            results = [reference(model) for model in self.models]
            assert torch.equal(*results)

    @precondition(lambda self: not self.merged)
    @rule()
    def merge(self) -> None:
        self.both(lambda model: model.merge_adapter())
        self.merged = True

    @precondition(lambda self: self.merged)
    @rule()
    def unmerge(self) -> None:
        self.both(lambda model: model.unmerge_adapter())
        self.merged = False

    @precondition(lambda self: not self.merged)
    @rule()
    def prepare_for_few_bits(self) -> None:
        """Freezes the base, makes what is not quantized float32, switches checkpointing on."""
        from peft import prepare_model_for_kbit_training

        def prepare(model: nn.Module) -> None:
            prepare_model_for_kbit_training(model)
            model.set_adapter(model.active_adapter)

        self.both(prepare)

    @precondition(lambda self: not self.merged and not self.trained_head)
    @rule(more=st.sampled_from([8, 32]))
    def resize(self, more: int) -> None:
        """Keeps the parameter and changes its size; torch.compile leaves a cycle behind that holds the last graph, and so the size."""
        gc.collect()
        self.both(lambda model: model.resize_token_embeddings(build.VOCABULARY + more, mean_resizing=False))

    @precondition(lambda self: not self.merged and (len(self.names) > 1 or not self.trained_head))
    @rule(data=st.data())
    def save_and_load_crosswise(self, data: st.DataObject) -> None:
        """What the fused model saves the plain one loads, and the other way round, bit for bit."""
        name = data.draw(st.sampled_from(self.names))
        rest = next((other for other in self.names if other != name), name)
        ours, theirs = self.models
        with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
            ours.save_pretrained(a, selected_adapters=[name], save_embedding_layers=False)
            theirs.save_pretrained(b, selected_adapters=[name], save_embedding_layers=False)
            for model, folder in ((ours, b), (theirs, a)):
                model.set_adapter(rest)
                model.delete_adapter(name)
                model.load_adapter(f"{folder}/{name}", name, is_trainable=True)
                model.set_adapter(name)

    @invariant()
    def is_the_same(self) -> None:
        ours, theirs = self.models
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        for model in self.models:  # (so that every state has something to train)
            model.get_input_embeddings().weight.requires_grad_()
        assert differences(step(ours, tokens()), step(theirs, tokens())) == []
        report = fxfuse.report(ours)
        assert report.errors == []
        assert not [note for note in report.notes if "ran eager" in note], report.notes


# Each example compiles a few graphs: a failing one is printed as it is, and not made smaller.
PHASES = (Phase.explicit, Phase.generate)


class TestAdapters(Adapters.TestCase):
    settings = settings(max_examples=3, stateful_step_count=6, deadline=None, phases=PHASES)


@pytest.mark.slow
class TestManyAdapters(Adapters.TestCase):
    settings = settings(max_examples=40, stateful_step_count=20, deadline=None, phases=PHASES)
