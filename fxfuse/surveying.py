"""A backend that finds the sites of a graph and surveys its joint graph, and runs the graph as it was: for ``explain --memory``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import fx

from ._torch import aot_autograd, functorch_config
from .aot import _SETTINGS, tag_plain
from .backend import Backend, counted, new_record, pending
from .memory.costs import Rates
from .memory.points import Survey
from .memory.surveys import remember
from .reporting.records import GraphRecord


@dataclass(frozen=True)
class Surveying:
    """As ``Planning``, and what a plan needs to know of the graph is found out, at the rates of some device."""

    backend: Backend
    rates: Rates

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        record = new_record()
        rewritten = self.backend.rewrite(gm, record)
        pending(record)
        if rewritten is not None and torch.is_grad_enabled():
            self._survey(rewritten, example_inputs, record)
        return counted(gm.forward, record)

    def _survey(self, gm: fx.GraphModule, example_inputs: Sequence[Any], record: GraphRecord) -> None:
        """Trace the joint graph as AOTAutograd would for training, and go no further."""
        try:
            with functorch_config.patch(_SETTINGS):
                aot_autograd(fw_compiler=_unused, partition_fn=partial(_stop_at, survey=self, record=record))(gm, example_inputs)
        except _Surveyed:
            return

    def take(self, joint: fx.GraphModule, num_fwd_outputs: int, record: GraphRecord) -> None:
        tag_plain(joint, num_fwd_outputs)
        remember(record, Survey(joint.graph, num_fwd_outputs, self.rates, choices=record.kind in ("block", "whole")))


class _Surveyed(Exception):
    """The joint graph is known; nothing more is wanted of AOTAutograd."""


def _stop_at(joint: fx.GraphModule, joint_inputs: Any, *, num_fwd_outputs: int, survey: Surveying, record: GraphRecord,
             **kwargs: Any) -> NoReturn:  # fmt: skip
    survey.take(joint, num_fwd_outputs, record)
    raise _Surveyed


def _unused(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Graphs without a backward are not partitioned: nothing is planned for them."""
    return gm.forward
