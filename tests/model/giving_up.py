"""A backend that runs graphs as they are, and gives the logits up as a fused loss would: their values are eager's, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import fx, nn

import fxfuse
from fxfuse.backend import copy_of, new_record
from fxfuse.canonical import canonicalize
from fxfuse.linear_loss.lazy_output import describe_output
from fxfuse.output_contract.fill import FilledOutputs
from tests.model.builders import VOCABULARY


@dataclass(frozen=True)
class GivesLogitsUp:
    """mode: as ``fxfuse.optimize(logits=...)``; "always" gives nothing up."""

    mode: str = "lazy"

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable:
        record = new_record()
        work = copy_of(gm)
        canonicalize(work)
        output = work.graph.output_node()
        values = list(output.args[0])
        given_up = [i for i, node in enumerate(values) if isinstance(node, fx.Node) and is_logits(node)]
        if self.mode == "always" or not given_up or len(given_up) == len(values):
            return gm.forward
        described = [describe_output(work, i, values[i]) for i in given_up]
        GIVEN_UP.append(len(described))
        run = gm.forward

        def without_logits(*args: Any) -> list[Any]:
            results = list(run(*args))
            for i in given_up:
                results[i] = None
            return results

        return FilledOutputs(without_logits, described, self.mode, record)


GIVEN_UP: list[int] = []


def optimized(model: nn.Module, logits: str = "lazy") -> nn.Module:
    """``model`` with its logits given up, and everything else as it was."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxfuse.api._backend", lambda *options: GivesLogitsUp(logits))
        return fxfuse.optimize(model)


def fused(model: nn.Module, **options: Any) -> nn.Module:
    """``model`` with its loss fused by the compiler."""
    return fxfuse.optimize(model, rules=("linear_loss",), remainder="eager", validate="off", strict=True, **options)


def is_logits(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1 and value.shape[-1] == VOCABULARY
