"""Which compiled graph has which survey. A graph may serve many modules and models; what it needs of memory is known once."""

from __future__ import annotations

from collections import defaultdict
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn

from ..reporting.records import GraphRecord, attached
from .costs import rates_of
from .plan import LEAST, LEAST_IN_TILES, PLAIN, Choice
from .points import Survey

_surveys: WeakKeyDictionary[GraphRecord, Survey] = WeakKeyDictionary()
_compiled: defaultdict[tuple[str, str], set[str]] = defaultdict(set)  # plans by kind and class of module


def survey_of(record: GraphRecord) -> Survey | None:
    """What was found out about a graph's memory; None for graphs compiled without a budget, and those without a backward."""
    return _surveys.get(record)


def remember(record: GraphRecord, survey: Survey) -> None:
    """``survey`` is that of the graph that ``record`` is of."""
    _surveys[record] = survey


def surveys_under(module: nn.Module) -> list[Survey]:
    """The surveys of the graphs that ran under ``module``, the last compiled first."""
    found = [survey_of(record) for record in attached(module)]
    return [survey for survey in reversed(found) if survey is not None]


def choice_for(joint: fx.Graph, num_fwd_outputs: int, plan: str, record: GraphRecord | None) -> Choice:
    """The choice that ``plan`` means for a joint graph, which is tagged as without a plan.

    Under a budget (any plan but ``none`` and ``save``) the graph is surveyed, unless a graph equal to it has been: another variant.
    """
    if plan in ("none", "save"):
        return Choice()
    survey = _known(joint, record)
    if survey is None:
        survey = Survey(joint, num_fwd_outputs, rates_of(_device(joint)), choices=record is None or record.kind in ("block", "whole"))
    if record is not None:
        remember(record, survey)
        survey.compiled = _compiled[record.kind, record.module]
    survey.compiled.add(plan)
    if plan == LEAST:
        return Choice(recompute=survey.chain[-1])
    if plan == LEAST_IN_TILES:
        return survey.leaving_least()
    return Choice() if plan in PLAIN else Choice.parse(plan)


def _known(joint: fx.Graph, record: GraphRecord | None) -> Survey | None:
    """A survey of a graph with the same nodes, made for a graph of the same class of module."""
    signature = None
    for other, survey in _surveys.items():
        if record is not None and (other.kind, other.module) == (record.kind, record.module):
            signature = signature or tuple(f"{node.name}:{node.target}" for node in joint.nodes)
            if survey.signature == signature:
                return survey
    return None


def _device(joint: fx.Graph) -> torch.device:
    for node in joint.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.device.type != "cpu":
            return value.device
    return torch.device("cpu")
