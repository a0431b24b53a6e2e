"""TRL's supervised trainer, eager and fused. It has a loss head of its own; what is accelerated there are the blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests.model import builders as build
from tests.model.quantized_models import in_4bit, with_adapters
from tests.model.saved_folders import different, weights
from tests.model.trainer_twins import arguments, assert_equal_runs, fresh_dynamo, run, twins
from tests.model.trl_texts import assistant, dataset, sentence, tokenizer, user

pytest.importorskip("trl")
__all__ = ["fresh_dynamo"]  # (a fixture)

CONVERSATIONS = {"messages": lambda rng: user(rng) + assistant(rng)}
COMPLETIONS = {"prompt": sentence, "completion": sentence}


def adapters() -> nn.Module:
    return build.with_lora(build.llama())


def trainer(folder: Path, columns: dict[str, Any] = CONVERSATIONS, rows: int = 16, **changes: Any) -> Callable[[nn.Module], Any]:
    from trl import SFTConfig, SFTTrainer

    def make(model: nn.Module) -> Any:
        settings = arguments(folder, SFTConfig, **{"max_length": 40, **changes})
        return SFTTrainer(model, settings, train_dataset=dataset(columns, rows), processing_class=tokenizer())

    return make


@pytest.mark.parametrize(
    ("columns", "changes"),
    [
        pytest.param(CONVERSATIONS, {"packing": True}, id="packing"),
        pytest.param(CONVERSATIONS, {"padding_free": True, "max_length": None}, id="padding-free", marks=pytest.mark.slow),
        pytest.param(CONVERSATIONS, {"assistant_only_loss": True}, id="assistant-only"),
        pytest.param(COMPLETIONS, {"completion_only_loss": True}, id="completion-only"),
        pytest.param(CONVERSATIONS, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}, id="checkpointing"),
        pytest.param(CONVERSATIONS, {"loss_type": "dft"}, id="dft", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_adapters(columns: dict[str, Any], changes: dict[str, Any], tmp_path: Path) -> None:
    assert_equal_runs(*twins(adapters, trainer(tmp_path, columns, **changes)), head="trl")


def test_full_weights_and_their_metrics(tmp_path: Path) -> None:
    ours, theirs = twins(build.llama, trainer(tmp_path))
    assert_equal_runs(ours, theirs, ("loss", "entropy", "mean_token_accuracy"), head="trl")


def test_adapters_over_4_bit_weights(tmp_path: Path) -> None:
    """The trainer makes such adapters bfloat16: their gradients differ where rounding tips over, and beside a float32 base their sums
    become part of what reads them, a gate with two additions in it."""
    ours, theirs = twins(lambda: with_adapters(in_4bit(build.llama())), trainer(tmp_path, packing=True, gradient_checkpointing=True))
    assert_equal_runs(ours, theirs, rounding=2**-8, head="trl", rules=("rms_norm", "nf4_linear", "unnamed"))


@pytest.mark.parametrize("model", [pytest.param(build.llama, marks=pytest.mark.slow), adapters], ids=["full", "lora"])
def test_folders_are_those_of_an_unfused_run(model: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Checkpoint, tokenizer, template and what ``save_model`` writes, byte for byte (the rate is zero, so that the weights are)."""
    for name in ("ours", "theirs"):
        made = trainer(tmp_path / name, max_steps=2, learning_rate=0.0, save_strategy="steps", save_steps=2, packing=True)
        run(model, made, fused=name == "ours").trainer.save_model(str(tmp_path / name / "saved"))
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert {"checkpoint-2", "saved"} <= {path.name for path in ours.iterdir()}
    assert weights(ours / "saved")
    assert different(ours, theirs) == []


def test_packs_of_any_length_compile_nothing_after_the_second(tmp_path: Path) -> None:
    """Packs without padding: each batch has a length, and numbers of its own (``max_length_q``...)."""
    short = run(adapters, trainer(tmp_path, max_steps=2, packing=True, rows=64), fused=True)
    long = run(adapters, trainer(tmp_path, max_steps=12, packing=True, rows=64), fused=True)
    assert len(set(long.curve("num_tokens"))) == 12
    assert graphs(long) <= graphs(short)


def graphs(of: Any) -> int:
    return len(of.report.graphs)
