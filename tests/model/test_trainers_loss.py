"""The trainer of transformers, eager and fused: loss of each step, gradients, metrics, and what its options change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from torch import nn

from tests.model import builders as build
from tests.model.trainer_twins import (
    Texts,
    arguments,
    assert_equal_runs,
    assert_runs_fused,
    fresh_dynamo,
    padded,
    run,
    twins,
)

__all__ = ["fresh_dynamo"]  # (a fixture)
LENGTHS = [12, 5, 9, 16, 7, 11, 14, 6, 10, 13, 8, 15, 12, 5, 9, 16]


def adapters() -> nn.Module:
    return build.with_lora(build.llama())


def metrics(prediction: Any) -> dict[str, float]:
    guessed = prediction.predictions[:, :-1].argmax(-1)
    return {"right": float((guessed == prediction.label_ids[:, 1:]).mean())}


def trainer(folder: Path, **changes: Any) -> Callable[[nn.Module], Any]:
    from transformers import Trainer

    def make(model: nn.Module) -> Any:
        return Trainer(
            model, arguments(folder, **changes), data_collator=padded, train_dataset=Texts(LENGTHS), eval_dataset=Texts(LENGTHS[:4], 1),
            compute_metrics=metrics if "eval_strategy" in changes else None,
        )  # fmt: skip

    return make


@pytest.mark.parametrize("model", [pytest.param(build.llama, marks=pytest.mark.slow), adapters], ids=["full", "lora"])
def test_tokens_are_counted_over_the_micro_batches_of_a_step(model: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Rows of different lengths: a mean of means would be another loss."""
    make = trainer(tmp_path, gradient_accumulation_steps=2, max_grad_norm=1.0)
    ours, theirs = twins(model, make)
    assert ours.trainer.model_accepts_loss_kwargs
    assert_equal_runs(ours, theirs, ("loss", "grad_norm"))


@pytest.mark.parametrize("reentrant", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_checkpointing_that_the_trainer_switches_on(reentrant: bool, tmp_path: Path) -> None:
    make = trainer(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_equal_runs(*twins(adapters, make))


def test_evaluation_reads_logits(tmp_path: Path) -> None:
    make = trainer(tmp_path, eval_strategy="steps", eval_steps=2)
    ours, theirs = twins(adapters, make)
    assert_equal_runs(ours, theirs, ("loss", "eval_loss", "eval_right"))
    assert len(ours.curve("eval_right")) == 2
    got, want = (each.trainer.predict(Texts(LENGTHS[:4], 2)).predictions for each in (ours, theirs))
    assert numpy.abs(got - want).max() <= 1e-4 * numpy.abs(want).max()


def test_autocast_is_as_near_to_float32_as_eager_is(tmp_path: Path) -> None:
    make = trainer(tmp_path, bf16=True, gradient_accumulation_steps=2)
    ours, theirs = twins(adapters, make)
    exact = run(adapters, trainer(tmp_path, gradient_accumulation_steps=2), fused=False)

    def error(of: Any) -> float:
        return sum((a - b) ** 2 for a, b in zip(of.curve(), exact.curve(), strict=True)) ** 0.5

    assert error(ours) <= 2 * error(theirs)
    assert_runs_fused(ours.report)


def test_label_smoothing_reads_logits_in_training(tmp_path: Path) -> None:
    assert_equal_runs(*twins(build.llama, trainer(tmp_path, label_smoothing_factor=0.1)))
