"""``explain``: what would be done to a model, told without doing it, from a config alone if need be.

The model is imagined: built, or copied, with fake tensors. Then the same capture is installed in the imagined copy
as ``optimize`` would install in the real one, and a forward runs through it, so that blocks, breaks and declines are
found by the code that will meet them. Only the backend differs: it stops once the sites are known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxfuse.capture import install
from fxfuse.fake_model import fake_mode, image_of, model_from_config, usual_inputs
from fxfuse.reporting.records import Report

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from fxfuse.backend import Backend


def explain_with(backend: Backend, model_or_config: nn.Module | PretrainedConfig, inputs: dict[str, Any]) -> Report:
    """The report that ``model_or_config`` would get from ``backend``, for ``inputs`` or usual ones."""
    from fxfuse.backend import planning

    with fake_mode() as mode, torch.enable_grad():
        if isinstance(model_or_config, nn.Module):
            model = image_of(model_or_config)
        else:
            model = model_from_config(model_or_config)
        model.train()
        given = {name: _imagined(mode, value) for name, value in inputs.items()} or usual_inputs(model)
        installation = install(model, planning(backend))
        model(**given)
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in given.items() if torch.is_tensor(value))
    notes = [f"what would be done; nothing was. Saved bytes are for {shapes}", *installation.notes()]
    return Report.of(model, notes=notes, errors=installation.errors())


def _imagined(mode: Any, value: Any) -> Any:
    return mode.from_tensor(value.cpu()) if isinstance(value, torch.Tensor) else value
