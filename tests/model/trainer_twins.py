"""The same training twice, eager and fused, from one seed: what every trainer's test compares.

Stochastic gradient descent without momentum keeps the two runs as near as their gradients are (Adam divides by a
gradient's size, so that rounding alone moves a parameter by a full step where its gradient is nearly zero).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse.reporting.records import Report
from tests.model.builders import VOCABULARY

PAD = 0


class Texts(torch.utils.data.Dataset):
    """Token sequences of the given lengths, with labels; the first quarter of each is not learnt (-100)."""

    def __init__(self, lengths: Sequence[int], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rows = [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        ids = self.rows[index].tolist()
        prompt = len(ids) // 4
        return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}


def padded(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """A batch, padded on the right to its longest row."""
    length = max(len(row["input_ids"]) for row in rows)

    def column(name: str, fill: int) -> Tensor:
        return torch.tensor([row[name] + [fill] * (length - len(row[name])) for row in rows])

    ids, labels = column("input_ids", PAD), column("labels", -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": (ids != PAD).long()}


def arguments(folder: Path, kind: Any = None, **changes: Any) -> Any:
    """Training arguments of ``kind`` (transformers' own): four steps of two rows on the CPU, every loss logged."""
    from transformers import TrainingArguments

    settings: dict[str, Any] = dict(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, learning_rate=0.1, optim="sgd",
        lr_scheduler_type="constant", use_cpu=True, report_to=[], logging_steps=1, save_strategy="no",
        disable_tqdm=True, seed=0, bf16=False, max_grad_norm=0.0, gradient_checkpointing=False,
    )  # fmt: skip
    return (kind or TrainingArguments)(**{**settings, **changes})


@dataclass
class Run:
    """What one training left behind."""

    trainer: Any
    model: nn.Module
    log: list[dict[str, float]]
    gradients: list[dict[str, Tensor]] = field(default_factory=list)

    def curve(self, *names: str) -> list[float]:
        """The logged values of these names (the loss, if none is given), in order."""
        return [float(row[name]) for row in self.log for name in (names or ("loss",)) if name in row]

    @property
    def report(self) -> Report:
        return fxfuse.report(self.model)


def run(make_model: Callable[[], nn.Module], make_trainer: Callable[[nn.Module], Any], fused: bool,
        resume: str | None = None, **options: Any) -> Run:  # fmt: skip
    """Train one model; ``fused``: with the line that this project is about."""
    from transformers import TrainerCallback

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            gradients.append(gradients_of(trainer.model))

    gradients: list[dict[str, Tensor]] = []
    model = make_model()
    if fused:
        model = fxfuse.optimize(model, **{"validate": "off", "remainder": "eager", "strict": True, **options})
    trainer = make_trainer(model)
    trainer.add_callback(Gradients())
    trainer.train(resume_from_checkpoint=resume)
    return Run(trainer, trainer.model, trainer.state.log_history, gradients)


def twins(make_model: Callable[[], nn.Module], make_trainer: Callable[[nn.Module], Any], **options: Any) -> tuple[Run, Run]:
    """(fused, eager)"""
    return run(make_model, make_trainer, True, **options), run(make_model, make_trainer, False)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every gradient, by name."""
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The norm of the difference over the norm, all tensors together; the names must be the same."""
    assert ours.keys() == theirs.keys(), set(ours) ^ set(theirs)
    pairs = [(ours[name].double(), theirs[name].double()) for name in ours]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)) ** 0.5


RULES = ("rms_norm", "gated_activation")


def assert_equal_runs(ours: Run, theirs: Run, keys: Iterable[str] = ("loss",), rounding: float = 2e-5, head: str = "",
                      rules: Iterable[str] = RULES) -> None:  # fmt: skip
    """float32: losses and gradients are equal but for rounding, and blocks did run fused.

    ``rounding``: of the gradients, whose dtype may be another. ``head``: the library that has a loss head of its own. ``rules``: that
    must have run.
    """
    assert len(ours.curve(*keys)) == len(theirs.curve(*keys)) > 0
    for got, want in zip(ours.curve(*keys), theirs.curve(*keys), strict=True):
        assert abs(got - want) <= 2e-5 * max(abs(want), 1.0), (ours.curve(*keys), theirs.curve(*keys))
    assert len(ours.gradients) == len(theirs.gradients) > 0
    for got, want in zip(ours.gradients, theirs.gradients, strict=True):
        assert distance(got, want) <= rounding
    assert_runs_fused(ours.report, rules, head=head)
    assert fxfuse.report(theirs.model).sites == []


def assert_runs_fused(report: Report, rules: Iterable[str] = RULES, head: str = "") -> None:
    """The rules' kernels were launched in training, and nothing went wrong or fell back to eager but a head of ``head``'s own."""
    for rule in rules:
        report.assert_fused(rule)
        assert all(site.launches > 0 for site in report.named(rule)), rule
    assert report.errors == []
    eager = [note for note in report.notes if "ran eager" in note]
    assert len(eager) == bool(head), eager
    assert all(f"its forward is that of {head}." in note for note in eager), eager


@pytest.fixture(autouse=True, scope="module")
def fresh_dynamo() -> Iterator[None]:
    """In place of the one of tests/conftest.py: models of one class share graphs, also those of different tests of a file."""
    yield
    torch.compiler.reset()
