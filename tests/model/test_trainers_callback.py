"""For people without a line of code to add: the callback, its name among the reporters, and Liger's switch in the trainer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxfuse
from tests.model import builders as build
from tests.model.trainer_twins import Texts, arguments, assert_runs_fused, fresh_dynamo, padded

__all__ = ["fresh_dynamo"]  # (a fixture)

OPTIONS = {"validate": "off", "remainder": "eager", "strict": True}
LENGTHS = [12, 5, 9, 16]


def trainer(folder: Path, model: Any, callbacks: list[Any], **changes: Any) -> Any:
    from transformers import Trainer

    source = {"model": model} if isinstance(model, nn.Module) else {"model_init": model}
    settings = arguments(folder, **{"max_steps": 2, **changes})
    return Trainer(**source, args=settings, data_collator=padded, train_dataset=Texts(LENGTHS), callbacks=callbacks)


def test_the_callback_optimizes_logs_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fxfuse.integrations.transformers import FxfuseCallback

    model = build.llama()
    made = trainer(tmp_path, model, [FxfuseCallback(html=tmp_path / "report.html", **OPTIONS)])
    assert "Pending" in str(fxfuse.report(model).notes)  # (optimized when the trainer was made, before anything wraps it)
    made.train()
    report = fxfuse.report(model)
    assert_runs_fused(report)
    logged = [row for row in made.state.log_history if "loss" in row]
    assert [row["fxfuse/sites_fused"] for row in logged] == [sum(site.count for site in report.sites if site.status == "fused")] * 2
    assert [row["fxfuse/launches"] for row in logged][1] == 2 * logged[0]["fxfuse/launches"]
    assert [row["fxfuse/errors"] for row in logged] == [0] * 2
    assert str(report).splitlines()[0] in capsys.readouterr().out
    assert "rms_norm" in (tmp_path / "report.html").read_text()
    json.dumps(made.state.log_history)  # (it is what the trainer saves)


def test_a_model_that_the_trainer_makes_anew(tmp_path: Path) -> None:
    """``model_init`` is called once to construct the trainer and again to train."""
    from fxfuse.integrations.transformers import FxfuseCallback

    made = trainer(tmp_path, lambda: build.llama(), [FxfuseCallback(**OPTIONS)])
    first = made.model
    made.train()
    assert made.model is not first
    assert_runs_fused(fxfuse.report(made.model))


def test_a_model_that_is_optimized_already_stays_as_it_is(tmp_path: Path) -> None:
    from fxfuse.integrations.transformers import FxfuseCallback

    model = fxfuse.optimize(build.llama(), exclude=("rms_norm", "residual_norm"), **OPTIONS)
    trainer(tmp_path, model, [FxfuseCallback(**OPTIONS)]).train()
    assert fxfuse.report(model).count("rms_norm") == 0
    fxfuse.report(model).assert_fused("gated_activation")


def test_a_wrapped_model_is_refused_with_what_to_do(tmp_path: Path) -> None:
    from fxfuse.integrations.transformers import FxfuseCallback

    with pytest.raises(ValueError, match=r"torch\.compile.*the model itself"):
        FxfuseCallback().on_init_end(arguments(tmp_path), None, None, model=torch.compile(build.llama()))


def test_its_name_among_the_reporters(tmp_path: Path) -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    from fxfuse.integrations import transformers as integration

    before = dict(INTEGRATION_TO_CALLBACK)
    integration.register()
    try:
        made = trainer(tmp_path, build.llama(), [], report_to=["fxfuse"])
        assert any(isinstance(each, integration.FxfuseCallback) for each in made.callback_handler.callbacks)
    finally:
        integration.unregister()
    integration.unregister()
    assert before == INTEGRATION_TO_CALLBACK


def test_a_script_is_started_with_the_name(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom transformers.integrations.integration_utils import get_reporting_integration_callbacks as f\n"
        "from fxfuse.integrations.transformers import FxfuseCallback\n"
        "print(__name__, sys.argv[1:], f(['fxfuse']) == [FxfuseCallback])\n"
    )
    command = [sys.executable, "-m", "fxfuse.integrations.transformers", str(script), "--report_to", "fxfuse"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "__main__ ['--report_to', 'fxfuse'] True"


class TestLigersSwitch:
    @pytest.fixture(autouse=True)
    def table(self) -> Any:
        monkey_patch = pytest.importorskip("liger_kernel.transformers.monkey_patch")
        from fxfuse.integrations import liger_compat

        before = dict(monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN)
        yield monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN
        liger_compat.disable()
        liger_compat.disable()
        assert before == monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN

    def test_importing_changes_nothing(self, table: dict[str, Any]) -> None:
        assert all(function.__module__.startswith("liger_kernel") for function in table.values())

    @pytest.mark.parametrize("adapters", [False, pytest.param(True, marks=pytest.mark.slow)])
    def test_the_switch_is_served(self, adapters: bool, tmp_path: Path) -> None:
        from fxfuse.integrations import liger_compat

        liger_compat.enable(**OPTIONS)
        model = build.with_lora(build.llama()) if adapters else build.llama()
        trainer(tmp_path, model, [], use_liger_kernel=True, liger_kernel_config={"rope": False}).train()
        report = fxfuse.report(model)
        assert_runs_fused(report)
        assert report.count("rope") == 0

    def test_types_that_liger_does_not_know(self, table: dict[str, Any]) -> None:
        from fxfuse.integrations import liger_compat

        assert "opt" not in table
        liger_compat.enable(**OPTIONS)
        model = build.causal_lm("opt", ffn_dim=112, word_embed_proj_dim=build.HIDDEN, hidden_size=build.HIDDEN)
        table["opt"](model=model)
        assert build.step(model, build.tokens())["loss"] > 0
        fxfuse.report(model).assert_fused("layer_norm")

    def test_a_class_is_no_model(self, table: dict[str, Any]) -> None:
        from fxfuse.integrations import liger_compat

        liger_compat.enable()
        with pytest.raises(ValueError, match="a model, not the class of one"):
            table["llama"]()
