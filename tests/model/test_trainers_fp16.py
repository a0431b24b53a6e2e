"""float16 autocast with a scaler, in a loop and in a trainer: gradients at ordinary scales; steps that overflow are skipped."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse.validation import error_ratio
from tests.model import builders as build
from tests.model.trainer_twins import (
    Texts,
    arguments,
    assert_runs_fused,
    distance,
    fresh_dynamo,
    padded,
    twins,
)

__all__ = ["fresh_dynamo"]  # (a fixture)

SHAPES = ((2, 12), (2, 7), (3, 9), (2, 12))


def adapters() -> nn.Module:
    return build.with_lora(build.llama())


def batches() -> list[dict[str, Tensor]]:
    return [build.tokens(*shape, seed=i) for i, shape in enumerate(SHAPES)]


def optimized(model: nn.Module) -> nn.Module:
    return fxfuse.optimize(model, validate="off", remainder="eager", strict=True)


def gradients(model: nn.Module, batch: dict[str, Tensor], scale: float | None) -> dict[str, Tensor]:
    """Unscaled gradients of a step in float16 autocast; without a scale, in the model's own dtype."""
    with torch.autocast("cpu", torch.float16, enabled=scale is not None):
        loss = model(**batch).loss
    (loss * (scale or 1.0)).backward()
    found = {name: p.grad / (scale or 1.0) for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("make", [build.llama, adapters], ids=["full", "lora"])
def test_scaled_gradients_are_as_near_to_float64_as_eagers(make: Callable[[], nn.Module]) -> None:
    model, batch = make(), batches()[0]
    exact = gradients(copy.deepcopy(model).double(), batch, None)
    eager = {scale: gradients(model, batch, scale) for scale in (1.0, 2.0**10, 2.0**16)}
    optimized(model)
    for scale, theirs in eager.items():
        ours = gradients(model, batch, scale)
        assert ours.keys() == theirs.keys() == exact.keys()
        every = [torch.cat([found[name].double().flatten() for name in exact]) for found in (ours, theirs, exact)]
        assert all(torch.isfinite(values).all() for values in every), scale
        assert float((every[0] - every[2]).norm()) <= 2 * float((every[1] - every[2]).norm()), scale
        assert all(error_ratio(ours[name], theirs[name], exact[name]) <= 2.5 for name in exact), scale
    fxfuse.report(model).assert_fused("linear_loss")


def trained(model: nn.Module, scale: float) -> tuple[list[float], list[float]]:
    """The losses and the scaler's scales of four steps; the scale is halved by a step whose gradients are not finite."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=100)
    losses, scales = [], []
    for batch in batches():
        with torch.autocast("cpu", torch.float16):
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        scales.append(scaler.get_scale())
    return losses, scales


@pytest.mark.parametrize("make", [build.llama, adapters], ids=["full", "lora"])
def test_a_loop_with_a_scaler(make: Callable[[], nn.Module]) -> None:
    theirs, ours = make(), optimized(make())
    (losses, scales), (expected, steady) = trained(ours, 2.0**14), trained(theirs, 2.0**14)
    assert scales == steady == [2.0**14] * 4
    assert losses == pytest.approx(expected, rel=3e-3)


def test_steps_that_overflow_are_skipped() -> None:
    """Scales at which no float16 gradient is finite: nothing is learnt, the scale falls, as in eager."""
    theirs, ours = adapters(), optimized(adapters())
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    (_, scales), (_, expected) = trained(ours, 2.0**40), trained(theirs, 2.0**40)
    assert scales == expected == [2.0**39, 2.0**38, 2.0**37, 2.0**36]
    assert all(torch.equal(p, before[name]) for name, p in ours.named_parameters())


@pytest.mark.parametrize("power", [20, 24, 28])
def test_a_scale_that_eager_bears_is_borne(power: int) -> None:
    """Between: the head's gradients are formed before the scale is known, so they overflow no earlier than eager's."""
    model, batch = adapters(), batches()[0]
    eager = gradients(model, batch, 2.0**power)
    ours = gradients(optimized(model), batch, 2.0**power)
    for name, theirs in eager.items():
        assert torch.isfinite(ours[name]).all() or not torch.isfinite(theirs).all(), name


def in_float16(folder: Path, scale: float) -> Callable[[nn.Module], Any]:
    """A maker of transformers' trainers with ``fp16=True``: autocast around the forward, a scaler around loss and steps.

    accelerate asks for a GPU there; its parts work on a CPU, and are put in after it was asked.
    """
    from accelerate.state import AcceleratorState
    from transformers import Trainer

    class InFloat16(Trainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            self.accelerator.state._mixed_precision = "fp16"
            self.accelerator.native_amp = True
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=100)

    def make(model: nn.Module) -> Any:
        AcceleratorState._reset_state(True)
        settings = arguments(folder, max_grad_norm=1.0, gradient_accumulation_steps=2, max_steps=3)
        return InFloat16(model, settings, data_collator=padded, train_dataset=Texts([12, 5, 9, 16] * 4))

    return make


@pytest.fixture
def fresh_state() -> Iterator[None]:
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(True)


@pytest.mark.usefixtures("fresh_state")
def test_the_trainers_own_fp16(tmp_path: Path) -> None:
    """Losses, clipped norms and the gradients that are scaled, as in eager; the head's loss is fused under autocast."""
    ours, theirs = twins(adapters, in_float16(tmp_path, 2.0**14))
    assert ours.curve() == pytest.approx(theirs.curve(), rel=3e-3)
    assert ours.curve("grad_norm") == pytest.approx(theirs.curve("grad_norm"), rel=1e-2)
    for got, want in zip(ours.gradients, theirs.gradients, strict=True):
        assert distance(got, want) <= 2e-2
    assert {run.trainer.accelerator.scaler.get_scale() for run in (ours, theirs)} == {2.0**14}
    assert_runs_fused(ours.report, ("rms_norm", "gated_activation", "linear_loss"))


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_state")
def test_the_trainer_skips_steps_that_overflow(tmp_path: Path) -> None:
    ours, theirs = twins(adapters, in_float16(tmp_path, 2.0**40))
    assert {run.trainer.accelerator.scaler.get_scale() for run in (ours, theirs)} == {2.0**37}
    untouched = adapters().state_dict()
    assert all(torch.equal(value, untouched[name]) for name, value in ours.model.state_dict().items())
