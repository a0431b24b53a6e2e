"""A callback for the trainers of transformers and TRL: for models that the trainer itself makes, and for metrics.

    trainer = Trainer(..., callbacks=[FxfuseCallback()])

For people who have a YAML file and no code, the callback has a name among transformers' reporters (``report_to: fxfuse``),
which this starts a script or a module with:

    python -m fxfuse.integrations.transformers SCRIPT.py ARGUMENTS...
    accelerate launch -m fxfuse.integrations.transformers -m trl.scripts.sft --config sft.yaml --report_to fxfuse
"""

from __future__ import annotations

import logging
import runpy
import sys
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

import fxfuse
from fxfuse.capture import find_installation
from fxfuse.reporting.records import Report

logger = logging.getLogger("fxfuse")

NAME = "fxfuse"


class FxfuseCallback(TrainerCallback):
    """Optimizes the trainer's model before anything wraps it, logs ``fxfuse/*`` metrics, prints the report at the end.

    A trainer tells its callbacks of the model when its own construction ends, which is after adapters are added and before
    accelerate shards, wraps or casts; that is when the model is optimized. A model that was optimized before stays as it is.

    ``html``: where to write the report as a page. ``options``: those of ``fxfuse.optimize``.
    Metrics join the logged values in the training state and for callbacks that come after this one; list it first.
    """

    def __init__(self, html: str | Path | None = None, **options: Any) -> None:
        self.html = html
        self.options = options

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:  # fmt: skip
        self._optimize(model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:  # fmt: skip
        """A model that the trainer has made anew since (``model_init``) is another one."""
        self._optimize(model)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, logs: Any = None, **kwargs: Any
    ) -> None:  # fmt: skip
        if logs is None or not isinstance(model, nn.Module):
            return
        values = metrics(fxfuse.report(model))
        logs.update(values)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:  # fmt: skip
        if not state.is_world_process_zero or not isinstance(model, nn.Module):
            return
        report = fxfuse.report(model)
        tqdm.write(str(report))
        if self.html is not None:
            report.to_html(self.html)

    def _optimize(self, model: Any) -> None:
        if isinstance(model, nn.Module) and find_installation(model) is None:
            fxfuse.optimize(model, **self.options)


def metrics(report: Report) -> dict[str, float]:
    """The numbers of a report that are worth a curve: a fall of ``launches`` per step is a fallback to eager."""
    by_status = {"fused": 0, "served": 0, "declined": 0, "pending": 0}
    for site in report.sites:
        by_status[site.status] += site.count
    return {
        "fxfuse/sites_fused": by_status["fused"] + by_status["served"],
        "fxfuse/sites_declined": by_status["declined"],
        "fxfuse/launches": sum(site.launches for site in report.sites),
        "fxfuse/graphs": len(report.graphs),
        "fxfuse/errors": len(report.errors),
    }


def register() -> None:
    """Let ``report_to="fxfuse"`` name the callback."""
    INTEGRATION_TO_CALLBACK[NAME] = FxfuseCallback


def unregister() -> None:
    """Take the name out again. Harmless where it is not known."""
    INTEGRATION_TO_CALLBACK.pop(NAME, None)


def start(arguments: list[str]) -> None:
    """Run a script (``SCRIPT.py ...``) or a module (``-m NAME ...``) as Python would, with the name registered."""
    if not arguments or arguments == ["-m"]:
        raise SystemExit("usage: python -m fxfuse.integrations.transformers (SCRIPT.py | -m MODULE) ARGUMENTS...")
    register()
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    # (the module of this name, not the copy of it that -m runs: its class is the one that users import)
    from fxfuse.integrations import transformers as integration

    integration.start(sys.argv[1:])
