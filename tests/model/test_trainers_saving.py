"""What the trainer writes and reads: checkpoints that continue bit for bit, the best model, folders that know nothing of fxfuse."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fxfuse
from tests.model import builders as build
from tests.model.builders import tokens
from tests.model.quantized_models import in_4bit, with_adapters
from tests.model.saved_folders import files, same, weights
from tests.model.trainer_twins import RULES, Texts, arguments, assert_runs_fused, fresh_dynamo, padded, run

__all__ = ["fresh_dynamo"]  # (a fixture)

LENGTHS = [12, 5, 9, 16, 7, 11, 14, 6]


def adapters() -> nn.Module:
    return build.with_lora(build.llama(), dropout=0.1)


def adapters_over_4_bits() -> nn.Module:
    return with_adapters(in_4bit(build.llama(1)))


def trainer(folder: Path, **changes: Any) -> Callable[[nn.Module], Any]:
    from transformers import Trainer

    def make(model: nn.Module) -> Any:
        data = {"train_dataset": Texts(LENGTHS), "eval_dataset": Texts(LENGTHS[:4], 1)}
        settings = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_grad_norm": 1.0, **changes}
        return Trainer(model, arguments(folder, **settings), data_collator=padded, **data)

    return make


@pytest.mark.parametrize("model", [
    pytest.param(build.llama, id="full", marks=pytest.mark.slow), pytest.param(adapters, id="lora"),
    pytest.param(adapters_over_4_bits, id="qlora", marks=pytest.mark.slow)])
def test_killed_in_step_four_and_resumed_bit_for_bit(model: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Adapters have dropout here: the random state comes back too."""
    from transformers import TrainerCallback

    class Kill(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    def killed(model: nn.Module) -> Any:
        made = trainer(tmp_path / "killed", save_strategy="steps", save_steps=2)(model)
        made.add_callback(Kill())
        return made

    whole = run(model, trainer(tmp_path / "whole", save_strategy="steps", save_steps=2), fused=True)
    with pytest.raises(KeyboardInterrupt):
        run(model, killed, fused=True)
    resumed = run(
        model, trainer(tmp_path / "killed"), fused=True, resume=str(tmp_path / "killed" / "checkpoint-2")
    )
    assert resumed.curve()[-2:] == whole.curve()[-2:]
    assert same(dict(resumed.model.state_dict()), dict(whole.model.state_dict()))
    assert_runs_fused(resumed.report, RULES if model is not adapters_over_4_bits else ("nf4_linear", "lora_linear"))


@pytest.mark.parametrize("model", [pytest.param(build.llama, marks=pytest.mark.slow), adapters], ids=["full", "lora"])
def test_folders_are_those_of_an_unfused_run_and_load_into_plain_models(model: Callable[[], nn.Module], tmp_path: Path) -> None:
    make = {name: trainer(tmp_path / name, save_strategy="steps", save_steps=4, learning_rate=0.0) for name in ("ours", "theirs")}
    ours, _ = run(model, make["ours"], fused=True), run(model, make["theirs"], fused=False)
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")
    assert same(*(weights(tmp_path / name / "checkpoint-4") for name in make))  # (the rate is zero)
    config = {name: next((tmp_path / name / "checkpoint-4").glob("*config.json")).read_text() for name in make}
    assert config["ours"] == config["theirs"]

    loaded = load(tmp_path / "ours" / "checkpoint-4").eval()
    fxfuse.restore(ours.model.eval())
    with torch.no_grad():
        assert torch.equal(loaded(**tokens()).logits, ours.model(**tokens()).logits)


def load(folder: Path) -> nn.Module:
    """By the libraries alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if (folder / "adapter_config.json").exists():
        return PeftModel.from_pretrained(build.llama(), str(folder))
    return AutoModelForCausalLM.from_pretrained(folder)


class Hub:
    """Stands in for the hub's client: keeps what is sent to it."""

    def __init__(self) -> None:
        self.sent: dict[str, bytes] = {}

    def create_repo(self, name: str, **options: Any) -> Any:
        return SimpleNamespace(repo_id=f"somebody/{name}")

    def upload_folder(self, folder_path: str, ignore_patterns: list[str], **options: Any) -> None:
        for name in files(Path(folder_path)):
            if not any(fnmatch(name, f"{pattern}*") for pattern in ignore_patterns):
                self.sent[name] = (Path(folder_path) / name).read_bytes()


@pytest.mark.parametrize("model", [pytest.param(build.llama, marks=pytest.mark.slow), adapters], ids=["full", "lora"])
def test_what_is_pushed_is_what_an_unfused_run_pushes(model: Callable[[], nn.Module], tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """The weights bit for bit; the training arguments name a folder, and the card has the losses of the run."""
    hubs = {}
    for fused in (True, False):
        hub = hubs[fused] = Hub()
        monkeypatch.setattr("transformers.trainer.hf_api", lambda hub=hub: hub)
        made = run(model, trainer(tmp_path / str(fused) / "model", max_steps=1, learning_rate=0.0), fused=fused)
        made.trainer.push_to_hub()
    ours, theirs = hubs[True].sent, hubs[False].sent
    assert ours.keys() == theirs.keys()
    assert any(name.endswith(".safetensors") for name in ours)
    assert [name for name in ours if ours[name] != theirs[name] and name not in ("training_args.bin", "README.md")] == []


@pytest.mark.parametrize("model", [pytest.param(build.llama, marks=pytest.mark.slow), adapters], ids=["full", "lora"])
def test_the_best_model_is_loaded_at_the_end_and_early_stopping_stops(model: Callable[[], nn.Module], tmp_path: Path) -> None:
    """A rate at which the loss on the held-out texts rises after the first evaluation."""
    from transformers import EarlyStoppingCallback

    def make(folder: str) -> Callable[[nn.Module], Any]:
        def stopping(model: nn.Module) -> Any:
            made = trainer(
                tmp_path / folder, max_steps=20, optim="sgd", learning_rate=3.0, max_grad_norm=0.0, eval_strategy="steps", eval_steps=1,
                save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_loss", save_total_limit=1,
            )(model)  # fmt: skip
            made.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
            return made

        return stopping

    ours, theirs = run(model, make("ours"), fused=True), run(model, make("theirs"), fused=False)
    assert 3 <= ours.trainer.state.global_step < 20
    assert ours.trainer.state.global_step == theirs.trainer.state.global_step
    names = {Path(each.trainer.state.best_model_checkpoint).name for each in (ours, theirs)}
    assert names == {f"checkpoint-{ours.trainer.state.best_global_step}"}
    best = weights(Path(ours.trainer.state.best_model_checkpoint))
    assert best
    now = ours.model.state_dict()
    assert all(torch.equal(value, now.get(name, now.get(name.replace(".weight", ".default.weight")))) for name, value in best.items())
    assert ours.trainer.evaluate()["eval_loss"] == min(ours.curve("eval_loss"))
    assert_runs_fused(ours.report)
