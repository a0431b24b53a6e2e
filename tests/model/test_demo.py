"""The parts of the demo that decide what it says: the text, the byte counter, the verdict on two curves."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn

import fxfuse
from fxfuse.demo import run
from fxfuse.demo.agreement import agreement
from fxfuse.demo.corpus import batches, text, tokens_of
from fxfuse.training import saved_for_backward, train

EPS = torch.finfo(torch.float32).eps


class Tiny(nn.Module):
    """An embedding, one hidden layer and a loss, with a causal language model's signature."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.hidden = nn.Linear(8, 16)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        logits = torch.tanh(self.hidden(self.embedding(input_ids)))
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


def test_the_text_is_real_and_tokens_give_it_back() -> None:
    written = text()
    assert len(written) >= 400_000
    sample = written[:50_000]
    tokens = tokens_of(sample, vocabulary=512)
    assert set(tokens.tolist()) <= set(range(512))
    assert len(tokens) < len(sample) / 2
    assert torch.equal(tokens, tokens_of(sample, vocabulary=512))


def test_batches_are_windows_of_the_text_and_the_same_for_a_seed() -> None:
    tokens = torch.arange(100)
    first, second = (list(batches(tokens, steps=3, rows=2, length=7, seed=5)) for _ in range(2))
    assert [batch.shape for batch in first] == [(2, 7)] * 3
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all((batch.diff(dim=1) == 1).all() for batch in first)


def test_saved_bytes_count_each_storage_once_and_no_parameter() -> None:
    model, ids = Tiny(), torch.zeros(2, 3, dtype=torch.long)
    embedded, hidden = 2 * 3 * 8 * 4, 2 * 3 * 16 * 4
    log_probabilities, total_weight = hidden, 4
    # The embedding saves the ids, the linear its input, tanh its output, log_softmax its output, nll the same
    # output again, the labels (the ids) and its total weight.
    assert saved_for_backward(model, ids) == embedded + hidden + log_probabilities + total_weight


def test_training_records_every_step() -> None:
    torch.manual_seed(1)
    model, ticks = Tiny(), []
    made = train(model, [torch.randint(16, (4, 8)) for _ in range(5)], 1e-2, lambda: ticks.append(1))
    assert len(made.losses) == len(made.seconds) == len(ticks) == 5
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A config of a very small causal language model."""
    size = dict(vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **size}))
    return str(tmp_path)


def test_the_demo_runs_on_a_model_of_the_users(folder: str) -> None:
    out = io.StringIO()
    assert run(Console(file=out, width=120), folder, steps=4)
    said = out.getvalue()
    for part in ("rms_norm", "gated_activation", "the same curve", "saved for the backward", "d_x", "s in all"):
        assert part in said


def test_the_demo_fails_when_a_fused_model_trains_otherwise(folder: str, monkeypatch) -> None:
    optimize = fxfuse.optimize

    def wrong(model: nn.Module) -> nn.Module:
        """The gradient of one norm's weight is half of what it should be."""
        model.model.norm.weight.register_hook(lambda gradient: gradient * 0.5)
        return optimize(model)

    monkeypatch.setattr(fxfuse, "optimize", wrong)
    assert not run(Console(file=io.StringIO()), folder, steps=4)


def curve(noise: float) -> list[float]:
    generator = torch.Generator().manual_seed(int(1e9 * noise))
    return [8 / (step + 1) + noise * torch.randn(1, generator=generator).item() for step in range(40)]


def test_curves_apart_by_rounding_are_the_same_curve() -> None:
    verdict = agreement(eager=curve(1.1e-6), fused=curve(1.3e-6), exact=curve(0), eps=EPS)
    assert verdict.agrees
    assert verdict.sentence.startswith("the same curve: over 40 steps")


@pytest.mark.parametrize("wrong", [lambda x: x + 1e-4, lambda x: x * (1 + 1e-5), lambda x: math.nan])
def test_curves_apart_by_more_are_not(wrong) -> None:
    fused = [wrong(loss) for loss in curve(1.3e-6)]
    verdict = agreement(eager=curve(1.1e-6), fused=fused, exact=curve(0), eps=EPS)
    assert not verdict.agrees
    assert "NOT the same curve" in verdict.sentence


def test_one_late_departure_is_seen() -> None:
    fused = curve(1.3e-6)
    fused[-1] += 1e-3
    assert not agreement(curve(1.1e-6), fused, curve(0), EPS).agrees
