"""Whole models whose logits are lazy: what libraries around them do with an output goes on working.

Most of it is about the output, not about the loss: there the backend gives logits up and fuses nothing (giving_up.py), so that all
values are eager's, bit for bit. ``fused`` is the compiler itself.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfuse
from fxfuse.errors import OutputContractError
from fxfuse.output_contract.tensor import LazyTensor
from tests.model import builders as build
from tests.model.builders import VOCABULARY, tokens
from tests.model.giving_up import fused, optimized


def notes(model: nn.Module) -> list[str]:
    return [note for note in fxfuse.report(model).notes if "logits" in note]


def close(ours: nn.Module, theirs: nn.Module) -> bool:
    """Gradients equal up to float32 rounding; each is there on both sides or on neither."""
    pairs = [(a.grad, b.grad) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)]
    assert all((a is None) == (b is None) for a, b in pairs)
    return all((a - b).norm() <= 2e-6 * b.norm() for a, b in pairs if a is not None)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": build.llama,
    "adapters": lambda: build.with_lora(build.llama()),
    "tied": lambda: build.llama(tie_word_embeddings=True),
    "a stack": lambda: seeded(build.NanoGPT),
    "bias": lambda: build.causal_lm("phi", partial_rotary_factor=0.5),
}


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


@pytest.mark.parametrize(("name", "prepare"), [
    *((name, "given up") for name in MODELS), ("llama", "fused"),
    *(pytest.param(name, "fused", marks=pytest.mark.slow) for name in MODELS if name != "llama"),
])
def test_a_model_trains_on_its_loss_and_on_its_logits(name: str, prepare: str) -> None:
    model, eager = (optimized if prepare == "given up" else fused)(MODELS[name]()), MODELS[name]()
    for m in (model, eager):
        m.eval()  # no dropout; the graphs are those of training
    for batch, use in ((tokens(), "loss"), (tokens(length=9), "both"), (tokens(3), "logits")):
        ours, theirs = model(**batch), eager(**batch)
        assert type(ours["logits"]) is LazyTensor
        assert ours["logits"].shape == theirs["logits"].shape
        for m, out in ((model, ours), (eager, theirs)):
            m.zero_grad()
            loss = out["loss"] if use != "logits" else 0
            (loss + (out["logits"].float().logsumexp(-1).square().mean() if use != "loss" else 0)).backward()
        assert close(model, eager)
        if use != "loss":
            assert torch.equal(ours["logits"], theirs["logits"])
    if prepare == "fused":
        fxfuse.report(model).assert_fused("linear_loss")
    assert notes(model)


class TestOutputs:
    def test_of_transformers(self) -> None:
        model = optimized(build.llama())
        out = model(**tokens())
        assert out[1] is out.logits is out["logits"] is out.to_tuple()[1]
        assert list(out)[:2] == ["loss", "logits"]
        assert out.logits.shape[-1] == VOCABULARY
        loss, logits = model(**tokens(), return_dict=False)[:2]
        assert type(logits) is LazyTensor
        assert loss.dim() == 0

    def test_pickles_and_copies_hold_real_tensors(self) -> None:
        model, eager = optimized(build.llama()), build.llama()
        out, want = model(**tokens()), eager(**tokens()).logits
        back = pickle.loads(pickle.dumps(out))
        assert type(back.logits) is Tensor
        assert torch.equal(back.logits, want)
        detached = {name: value.detach() for name, value in model(**tokens(), use_cache=False).items()}
        assert torch.equal(copy.deepcopy(detached)["logits"], want)

    def test_walkers_over_tensors(self) -> None:
        from transformers.trainer_pt_utils import nested_detach, nested_numpify
        from transformers.trainer_utils import EvalPrediction

        model, eager = optimized(build.llama()), build.llama()
        outputs = nested_detach(tuple(model(**tokens(), use_cache=False).values()))
        assert type(outputs[1]) is LazyTensor
        assert not outputs[1].requires_grad
        predicted = EvalPrediction(nested_numpify(outputs[1]), tokens()["labels"].numpy()).predictions
        assert (predicted == eager(**tokens()).logits.detach().numpy()).all()
        moved = torch.utils._pytree.tree_map(lambda t: t.to("cpu", non_blocking=True), outputs)
        assert torch.equal(moved[1], eager(**tokens()).logits)

    def test_what_a_trainer_measures_of_them_reads_them_and_the_report_says_so(self) -> None:
        model, eager = optimized(build.llama()), build.llama()

        def measures(out: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
            """Entropy and token accuracy, as supervised fine-tuning trainers log them."""
            with torch.no_grad():
                shifted = out.logits[..., :-1, :].contiguous()
                entropy = torch.distributions.Categorical(logits=shifted).entropy().mean()
                return entropy, (shifted.argmax(-1) == labels[..., 1:]).float().mean()

        for _ in range(2):
            got, want = (measures(m(**tokens()), tokens()["labels"]) for m in (model, eager))
            assert got == want
        assert "read 2 times (materialised: 2, first by test_lazy_models.py:" in notes(model)[0]

    def test_what_generates_and_evaluates_has_real_ones(self) -> None:
        model = optimized(build.llama())
        model(**tokens())["loss"].backward()
        with torch.no_grad():
            assert type(model(**tokens()).logits) is Tensor
        with torch.inference_mode():
            assert type(model.eval()(**tokens()).logits) is Tensor
        assert type(model(input_ids=tokens()["input_ids"]).logits) is Tensor  # no loss, nothing to fuse


class TestUntilWhen:
    def test_evaluation_lets_go_of_the_last_training_step(self) -> None:
        model = optimized(build.llama())
        states: list[weakref.ref] = []
        model.model.register_forward_hook(lambda module, args, out: states.append(weakref.ref(out.last_hidden_state)))
        out = model(**tokens())
        out.loss.backward()
        logits = out.logits
        del out
        assert states[0]() is not None
        with torch.no_grad():
            model(**tokens())
        gc.collect()
        assert states[0]() is None
        with pytest.raises(OutputContractError, match="ran forward again"):
            logits.sum()

    def test_another_model_of_the_class_ends_nothing(self) -> None:
        first, second, eager = optimized(build.llama()), optimized(build.llama(seed=1)), build.llama()
        logits = first(**tokens()).logits
        second(**tokens())
        assert torch.equal(logits, eager(**tokens()).logits)

    @pytest.mark.parametrize("fused", [True, False])
    def test_an_optimizer_step_ends_it(self, fused: bool) -> None:
        model = optimized(build.with_lora(build.llama()))
        model.get_base_model().lm_head.weight.requires_grad_()
        steps = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01, fused=fused)
        out = model(**tokens())
        out.loss.backward()
        steps.step()
        with pytest.raises(OutputContractError, match="optimizer step"):
            out.logits.argmax(-1)

    def test_steps_of_adapters_below_a_frozen_head_do_not(self) -> None:
        model, eager = optimized(build.with_lora(build.llama())), build.with_lora(build.llama())
        steps = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01, fused=True)
        out = model(**tokens())
        out.loss.backward()
        steps.step()
        assert torch.equal(out.logits, eager(**tokens()).logits)  # as they were in the forward, as in eager

    def test_accumulation_that_sums_what_it_keeps_reads_in_time(self) -> None:
        model, eager = optimized(build.llama()), build.llama()
        for m in (model, eager):
            best = []
            for seed in range(3):
                out = m(**tokens(seed=seed))
                best.append(out.logits.argmax(-1))
                (out.loss / 3).backward()
            m.best = torch.stack(best)
        assert torch.equal(model.best, eager.best)
        assert close(model, eager)


class TestModes:
    def test_always(self) -> None:
        model = fused(seeded(build.NanoGPT), logits="always")
        assert type(model(**tokens())["logits"]) is Tensor
        declined = fxfuse.report(model).named("linear_loss", "declined")
        assert "outputs are real" in declined[0].reason

    def test_never(self) -> None:
        model, eager = fused(seeded(build.NanoGPT), logits="never"), seeded(build.NanoGPT)
        out, want = model(**tokens()), eager(**tokens())
        out["loss"].backward()
        want["loss"].backward()
        assert close(model, eager)
        assert out["logits"].shape == want["logits"].shape
        with pytest.raises(OutputContractError, match="logits='never'"):
            out["logits"].argmax(-1)
        assert notes(model) == ["logits of lm_head: never computed; reading them is an error"]

    def test_a_mode_that_does_not_exist(self) -> None:
        with pytest.raises(ValueError, match="'lazy', 'always', 'never'"):
            fused(build.NanoGPT(), logits="real")


class Head(nn.Module):
    """A frozen recipe around a projection: ``between`` is what stands before it."""

    def __init__(self, between: Callable[[Tensor], Tensor], autocast: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.lm_head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY)
        self.between, self.autocast = between, autocast

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.between(self.embed(input_ids))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            logits = self.lm_head(hidden)
            loss = F.cross_entropy(logits.float().view(-1, VOCABULARY), labels.view(-1))
        return {"loss": loss, "logits": logits}


@pytest.mark.parametrize(("between", "autocast", "why"), [
    (lambda x: F.dropout(x, 0.5), False, "draws random numbers"),
    (lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)), False, "draws random numbers"),
    (torch.tanh, True, "switches autocast"),
], ids=["dropout", "bernoulli", "autocast in the graph"])
def test_logits_that_could_come_out_otherwise_stay_real(between: Callable, autocast: bool, why: str) -> None:
    model, eager = fused(Head(between, autocast)), Head(between, autocast)
    torch.manual_seed(1)
    out = model(**tokens())
    torch.manual_seed(1)
    want = eager(**tokens())
    assert type(out["logits"]) is Tensor
    assert out["logits"].dtype == want["logits"].dtype
    assert torch.equal(out["logits"], want["logits"])
    assert why in fxfuse.report(model).named("linear_loss", "declined")[0].reason


def test_a_captured_module_that_is_given_lazy_logits() -> None:
    class Measure(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Linear(VOCABULARY, 1)

        def forward(self, logits: Tensor) -> Tensor:
            return self.scale(logits.softmax(-1)).mean()

    model, eager, measure = optimized(build.llama()), build.llama(), seeded(Measure)
    plain = copy.deepcopy(measure)
    fxfuse.optimize(measure, rules=(), remainder="eager")
    for _ in range(2):
        got, want = measure(model(**tokens()).logits), plain(eager(**tokens()).logits)
        assert torch.equal(got, want)
    assert fxfuse.report(measure).errors == []
    assert not any("stays eager" in note for note in fxfuse.report(measure).notes)
