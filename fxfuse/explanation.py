"""``explain``: what would be done to a model, told without doing it, from a config alone if need be.

The model is imagined: built, or copied, with fake tensors. Then the same capture is installed in the imagined copy
as ``optimize`` would install in the real one, and a forward runs through it, so that blocks, breaks and declines are
found by the code that will meet them. Only the backend differs: it stops once the sites are known, and for a memory
budget once the joint graphs are surveyed (surveying.py), from which the planner that ``optimize`` uses makes its plan.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from fxfuse._torch import DataDependentOutputException, disable_current_modes
from fxfuse.capture import install
from fxfuse.capture.context import GraphCompiler
from fxfuse.errors import UnsupportedGraph
from fxfuse.fake_adaptation import in_4bit, is_4bit, with_adapters
from fxfuse.fake_model import fake_mode, image_of, model_from_config, unpacked, usual_inputs
from fxfuse.lowering import implementation_on
from fxfuse.memory.budget import parse_budget
from fxfuse.prediction import check, predicted, rates_for
from fxfuse.reporting.records import Report

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from fxfuse.backend import Backend


@dataclass(frozen=True)
class Setup:
    """How the model would be trained, as far as neither it nor its config says.

    memory:        the budget, as ``optimize`` takes it
    batch, length: rows, and tokens in a row; 0: usual ones
    four_bit:      linears in NF4, as a config with ``load_in_4bit`` says by itself
    rank:          of LoRA adapters on all linears; 0: none, all parameters are trained
    optimizer:     a key of ``OPTIMIZERS``
    device:        the name of a GPU whose rates are known; "": the one that is here, else an H200
    """

    memory: float | str | None = None
    batch: int = 0
    length: int = 0
    four_bit: bool = False
    rank: int = 0
    optimizer: str = "adamw"
    device: str = ""


def explain_config(config: PretrainedConfig, setup: Setup) -> Report:
    """What ``optimize`` would do to the model of a config, trained so."""
    from fxfuse.backend import Backend

    return explain_with(Backend(remainder="eager", validate="off"), config, {}, setup)


def explain_with(
    backend: Backend, model_or_config: nn.Module | PretrainedConfig, inputs: dict[str, Any], setup: Setup | None = None
) -> Report:
    """The report that ``model_or_config`` would get from ``backend``, for ``inputs`` or usual ones."""
    setup = setup or Setup()
    budget = parse_budget(setup.memory)
    if budget is not None:
        check(budget, setup.device, setup.optimizer)
    with fake_mode() as mode, torch.enable_grad():
        model = _set_up(_imagine(model_or_config), model_or_config, setup)
        given = {name: _fake(mode, value) for name, value in inputs.items()} or usual_inputs(model, setup.batch, setup.length)
        installation = install(model, _apart(_compiler(backend, budget is not None, setup)))
        with _trainers_autocast(setup), unpacked():
            mood = _forward(model, given)
    shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in given.items() if torch.is_tensor(value))
    notes = [f"this is what would be done; nothing was. Saved bytes are for {shapes}", *mood, *installation.notes()]
    report = Report.of(model, notes=notes, errors=installation.errors())
    if budget is not None:
        report.memory = predicted(model, budget, setup)
    for graph in report.graphs:
        graph.calls = 0
    for site in report.sites:
        site.launches = 0
        if site.status == "pending":
            site.status, site.implementation = "fused", implementation_on(_device_type(model_or_config))
    return report


def _compiler(backend: Backend, with_memory: bool, setup: Setup) -> GraphCompiler:
    if with_memory:
        from fxfuse.surveying import Surveying

        return Surveying(backend, rates_for(setup.device))
    from fxfuse.backend import planning

    return planning(backend)


def _set_up(model: nn.Module, model_or_config: Any, setup: Setup) -> nn.Module:
    """The imagined model as it would be trained."""
    if setup.memory is not None and hasattr(getattr(model, "config", None), "use_cache"):
        model.config.use_cache = False  # as trainers do; a cache would hold keys and values that no backward needs
    if setup.four_bit or (not isinstance(model_or_config, nn.Module) and is_4bit(model_or_config)):
        model = in_4bit(model)
    return with_adapters(model, setup.rank) if setup.rank else model


def _trainers_autocast(setup: Setup) -> AbstractContextManager:
    """Adapters are trained under bfloat16 autocast."""
    return torch.autocast("cpu", torch.bfloat16) if setup.rank else nullcontext()


def _device_type(model_or_config: nn.Module | PretrainedConfig) -> str:
    """Where it would run: where the model is; for a config, on the GPU if there is one."""
    if isinstance(model_or_config, nn.Module):
        return next((p.device.type for p in model_or_config.parameters()), "cpu")
    return "cuda" if torch.cuda.is_available() else "cpu"


def _forward(model: nn.Module, inputs: dict[str, Any]) -> list[str]:
    """Run a training forward, or where that looks at random numbers (layer drop), one of evaluation; notes on it."""
    looks_at_values = GuardOnDataDependentSymNode, DataDependentOutputException
    try:
        model.train()(**inputs)
    except looks_at_values:
        try:
            model.eval()(**inputs)
        except looks_at_values as error:
            raise UnsupportedGraph(
                f"{type(model).__name__} cannot be explained without data: its forward looks at values "
                f"({str(error).splitlines()[0]}); use fxfuse.optimize(model, example_inputs=...) and fxfuse.report"
            ) from error
        return ["its training forward looks at random numbers, so this is its evaluation forward"]
    return []


def _apart(compiler: GraphCompiler) -> GraphCompiler:
    """``compiler`` outside of the imagined world: it has fake tensors of its own."""

    def compile_apart(gm: Any, example_inputs: Any) -> Any:
        with disable_current_modes():
            return compiler(gm, example_inputs)

    return compile_apart


def _imagine(model_or_config: nn.Module | PretrainedConfig) -> nn.Module:
    if isinstance(model_or_config, nn.Module):
        return image_of(model_or_config)
    if not hasattr(model_or_config, "model_type"):
        raise TypeError(
            "fxfuse.explain takes a torch.nn.Module or a transformers config, "
            f"got {type(model_or_config).__name__}"
        )
    return model_from_config(model_or_config)


def _fake(mode: Any, value: Any) -> Any:
    return mode.from_tensor(value.cpu()) if isinstance(value, torch.Tensor) else value
