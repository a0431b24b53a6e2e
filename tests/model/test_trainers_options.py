"""Options of the trainer that meet a captured model: lengths in groups, noise on embeddings, text generated while training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxfuse
from tests.model import builders as build
from tests.model.trainer_twins import (
    Texts,
    arguments,
    assert_equal_runs,
    assert_runs_fused,
    fresh_dynamo,
    gradients_of,
    padded,
    run,
    twins,
)

__all__ = ["fresh_dynamo"]  # (a fixture)

MANY = [4 + (7 * i) % 29 for i in range(48)]


def trainer(folder: Path, lengths: list[int] = MANY, **changes: Any) -> Callable[[nn.Module], Any]:
    from transformers import Trainer

    def make(model: nn.Module) -> Any:
        held_out = Texts(lengths[:4], 1) if "eval_strategy" in changes else None
        return Trainer(model, arguments(folder, **changes), data_collator=padded, train_dataset=Texts(lengths), eval_dataset=held_out)

    return make


def test_any_number_of_lengths_is_four_graphs(tmp_path: Path) -> None:
    """Batches grouped by length: blocks with a padding mask and (rows of equal length) without one, norm, head."""
    few = run(build.llama, trainer(tmp_path, max_steps=6, train_sampling_strategy="group_by_length"), fused=True)
    many = run(build.llama, trainer(tmp_path, max_steps=24, train_sampling_strategy="group_by_length"), fused=True)
    assert len(many.curve()) == 24
    assert sorted(graph.kind for graph in many.report.graphs) == ["block", "block", "head", "leaf"]
    assert len(few.report.graphs) == 4
    assert_runs_fused(many.report)


@pytest.mark.slow
def test_noise_on_embeddings(tmp_path: Path) -> None:
    ours, theirs = twins(build.llama, trainer(tmp_path, neftune_noise_alpha=5.0))
    assert_equal_runs(ours, theirs)
    quiet = run(build.llama, trainer(tmp_path), fused=False)
    assert ours.curve() != pytest.approx(quiet.curve(), rel=1e-4)  # (the noise is there)


class Unlearnt(Texts):
    """Every third row has no token to learn."""

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row = super().__getitem__(index)
        return {**row, "labels": [-100] * len(row["labels"])} if index % 3 == 1 else row


def test_micro_batches_in_which_nothing_is_learnt(tmp_path: Path) -> None:
    """They add zero to a step that other rows are part of; a step of theirs alone is zero or NaN wherever it is in eager."""
    from transformers import Trainer

    def make(model: nn.Module) -> Any:
        settings = arguments(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=2, max_grad_norm=1.0)
        return Trainer(model, settings, data_collator=padded, train_dataset=Unlearnt(MANY))

    assert_equal_runs(*twins(build.llama, make), ("loss", "grad_norm"))


@pytest.mark.parametrize("counted", [{}, {"num_items_in_batch": 0}], ids=["mean", "none counted"])
def test_a_step_in_which_nothing_is_learnt(counted: dict[str, int]) -> None:
    """NaN where eager has NaN, and nothing of it is left in the step that follows."""
    def losses_and_gradients(model: nn.Module) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        found = []
        for labels in (torch.full((2, 12), -100), None):
            batch = build.tokens()
            batch["labels"] = batch["labels"] if labels is None else labels
            loss = model(**batch, **(counted if labels is not None else {})).loss
            loss.backward()
            found.append((loss.detach(), gradients_of(model)))
            model.zero_grad(set_to_none=True)
        return found

    model = build.llama()
    theirs = losses_and_gradients(model)
    ours = losses_and_gradients(fxfuse.optimize(model, validate="off", remainder="eager", strict=True))
    for (loss, found), (expected, wanted) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(loss, expected, equal_nan=True)
        assert found.keys() == wanted.keys()
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], equal_nan=True, rtol=1e-4, atol=1e-6)


def test_a_budget_stands_in_for_the_checkpointing_that_the_trainer_switches_on(tmp_path: Path) -> None:
    """Over micro-batches and evaluations; the model's flag is as the trainer left it."""
    make = trainer(tmp_path, gradient_checkpointing=True, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=2)
    ours, theirs = run(build.llama, make, True, memory="64MiB"), run(build.llama, make, False)
    assert_equal_runs(ours, theirs, ("loss", "eval_loss"))
    assert ours.model.is_gradient_checkpointing
    notes = " ".join(ours.report.notes)
    assert "gradient checkpointing of 3 modules is switched off while the model runs" in notes
    assert "this is no CUDA device, so the budget is one of bytes saved for the backward" in notes


@pytest.mark.slow
def test_a_compiler_that_the_trainer_puts_on_top(tmp_path: Path) -> None:
    """It leaves the captured blocks to us."""
    assert_equal_runs(*twins(build.llama, trainer(tmp_path, torch_compile=True, torch_compile_backend="eager")))


def test_text_generated_in_a_callback(tmp_path: Path) -> None:
    """Greedy text after every step: the same tokens, and training goes on as if nothing had been asked."""
    from transformers import TrainerCallback

    texts: dict[bool, list[list[int]]] = {True: [], False: []}

    def sampling(fused: bool) -> Callable[[nn.Module], Any]:
        class Sample(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
                model.eval()
                prompt = torch.tensor([[5, 6, 7]])
                texts[fused].append(model.generate(prompt, max_new_tokens=6, do_sample=False)[0].tolist())
                model.train()

        def make(model: nn.Module) -> Any:
            made = trainer(tmp_path)(model)
            made.add_callback(Sample())
            return made

        return make

    ours, theirs = run(build.llama, sampling(True), True), run(build.llama, sampling(False), False)
    assert_equal_runs(ours, theirs)
    assert texts[True] == texts[False]
    assert len(texts[True]) == 4


@pytest.mark.slow
def test_predictions_by_generation(tmp_path: Path) -> None:
    """An encoder-decoder in the trainer that evaluates what it generates."""
    from transformers import GenerationConfig, Seq2SeqTrainer, Seq2SeqTrainingArguments

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        batch = padded(rows)
        return {**batch, "labels": batch["input_ids"].clone()}

    def metrics(prediction: Any) -> dict[str, float]:
        return {"sum": float(prediction.predictions.clip(0).sum()), "length": float(prediction.predictions.shape[1])}

    def make(model: nn.Module) -> Any:
        settings = arguments(
            tmp_path, Seq2SeqTrainingArguments, eval_strategy="steps", eval_steps=2, predict_with_generate=True,
            generation_config=GenerationConfig(max_new_tokens=5, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1),
        )  # fmt: skip
        data = {"train_dataset": Texts(MANY[:16]), "eval_dataset": Texts(MANY[:4], 1)}
        return Seq2SeqTrainer(model, settings, data_collator=collate, compute_metrics=metrics, **data)

    ours, theirs = run(build.t5, make, True), run(build.t5, make, False)
    assert ours.curve("eval_sum", "eval_length") == theirs.curve("eval_sum", "eval_length")
    assert ours.curve("loss", "eval_loss") == pytest.approx(theirs.curve("loss", "eval_loss"), rel=2e-5)
    assert_runs_fused(ours.report, rules=["rms_norm"])
