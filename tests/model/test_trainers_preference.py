"""TRL's trainers from preferences and rewards, eager and fused: pairs, labels, rewards, and sampled completions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.model import builders as build
from tests.model.saved_folders import different, weights
from tests.model.trainer_twins import arguments, assert_equal_runs, fresh_dynamo, run, twins
from tests.model.trl_texts import assistant, dataset, tokenizer, user

pytest.importorskip("trl")
__all__ = ["fresh_dynamo"]  # (a fixture)

PAIRS = {"prompt": user, "chosen": assistant, "rejected": assistant}
JUDGED = {"prompt": user, "completion": assistant, "label": lambda rng: rng.random() < 0.5}
PROMPTS = {"prompt": user}


def adapters() -> nn.Module:
    return build.with_lora(build.llama())


def scorer() -> nn.Module:
    """A decoder with one number for an output."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**{**build.DECODER, "num_hidden_layers": 2, "num_labels": 1})).train()


Make = Callable[[nn.Module], Any]


def trainer(kind: str, folder: Path, columns: dict[str, Any], more: dict[str, Any] | None = None, **changes: Any) -> Make:
    """A maker of trainers of that name, as TRL calls it without "Trainer" and "Config"."""
    import trl
    from trl.experimental import orpo

    source = trl if hasattr(trl, f"{kind}Config") else orpo
    make_config, make_trainer = getattr(source, f"{kind}Config"), getattr(source, f"{kind}Trainer")

    def make(model: nn.Module) -> Any:
        settings = arguments(folder, make_config, **changes)
        return make_trainer(model, args=settings, train_dataset=dataset(columns), processing_class=tokenizer(), **(more or {}))

    return make


def test_dpo_with_adapters_over_their_base(tmp_path: Path) -> None:
    """The reference is the model with its adapters off, without gradients, in every step."""
    ours, theirs = twins(adapters, trainer("DPO", tmp_path, PAIRS, max_length=40))
    assert_equal_runs(ours, theirs, ("loss", "rewards/margins", "logps/chosen"), head="trl")


@pytest.mark.slow
def test_dpo_of_all_weights(tmp_path: Path) -> None:
    """The reference is another model, a plain one."""
    make = trainer("DPO", tmp_path, PAIRS, {"ref_model": build.llama()}, max_length=40, gradient_checkpointing=True)
    ours, theirs = twins(build.llama, make)
    assert_equal_runs(ours, theirs, ("loss", "rewards/margins"), head="trl")


@pytest.mark.slow
def test_folders_of_dpo_are_those_of_an_unfused_run(tmp_path: Path) -> None:
    """The adapter, its config, the tokenizer (the rate is zero)."""
    for name in ("ours", "theirs"):
        changes = {"max_length": 40, "max_steps": 1, "learning_rate": 0.0, "save_strategy": "steps", "save_steps": 1}
        make = trainer("DPO", tmp_path / name, PAIRS, **changes)
        run(adapters, make, fused=name == "ours")
    assert weights(tmp_path / "ours" / "checkpoint-1")
    assert different(tmp_path / "ours", tmp_path / "theirs") == []


@pytest.mark.slow
def test_kto(tmp_path: Path) -> None:
    make = trainer("KTO", tmp_path, JUDGED, max_length=40, per_device_train_batch_size=4)
    assert_equal_runs(*twins(adapters, make), head="trl")


@pytest.mark.slow
def test_orpo(tmp_path: Path) -> None:
    """Reads logits: its odds are made of them."""
    make = trainer("ORPO", tmp_path, PAIRS, max_length=40)
    assert_equal_runs(*twins(adapters, make), ("loss", "rewards/margins"))


@pytest.mark.slow
def test_rewards(tmp_path: Path) -> None:
    make = trainer("Reward", tmp_path, PAIRS, max_length=40)
    assert_equal_runs(*twins(scorer, make), ("loss", "margin", "mean_reward"))


def test_grpo_generates_in_training(tmp_path: Path) -> None:
    def reward(completions: list[Any], **kwargs: Any) -> list[float]:
        return [float(len(set(completion[0]["content"].split()))) for completion in completions]

    make = trainer(
        "GRPO", tmp_path, PROMPTS, {"reward_funcs": reward}, max_completion_length=8, num_generations=2, per_device_train_batch_size=4,
        learning_rate=1e-3, beta=0.04, num_iterations=2,
    )  # fmt: skip
    ours, theirs = twins(adapters, make)
    assert_equal_runs(ours, theirs, ("loss", "reward", "completions/mean_length"), head="trl")
