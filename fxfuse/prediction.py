"""What a training step would hold and take on a device that need not be here, from surveys of an imagined model's graphs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fxfuse.capture.governor import AUTO_MARGIN, MARGIN
from fxfuse.errors import UnsupportedGraph
from fxfuse.memory.budget import Budget
from fxfuse.memory.costs import TABLE, Rates, rates_named, rates_of
from fxfuse.memory.plan import MemoryPlan, size_text
from fxfuse.memory.planner import Group, Outside, Problem, fastest_plan, frontier
from fxfuse.memory.points import Block, Survey
from fxfuse.memory.sizes import Sizes
from fxfuse.memory.surveys import survey_of
from fxfuse.reporting.records import attached

if TYPE_CHECKING:
    from fxfuse.explanation import Setup

USUAL_DEVICE = "NVIDIA H200"
PLANNED = ("block", "whole")  # captured modules that have points of their own
BUDGETS_SHOWN = 10
# What torch reports as total memory of these devices, in bytes.
DEVICE_BYTES = {
    "NVIDIA H200": 150_110_011_392,
    "NVIDIA H100 80GB HBM3": 84_974_239_744,
    "NVIDIA A100-SXM4-80GB": 84_987_740_160,
}
# What an optimizer keeps for a parameter, in bytes.
OPTIMIZERS: dict[str, Callable[[Tensor], int]] = {
    "adamw": lambda parameter: 2 * parameter.nbytes,
    "adamw_8bit": lambda parameter: 2 * parameter.numel(),
    "momentum": lambda parameter: parameter.nbytes,
    "sgd": lambda parameter: 0,
    "none": lambda parameter: 0,
}


def rates_for(device: str) -> Rates:
    """Rates of the named device; unnamed, of the one that is here, measured, else of the usual one, from the table."""
    if device and device not in TABLE:
        raise ValueError(f"nothing is known of a device {device!r}; there are {', '.join(sorted(TABLE))}")
    if not device and torch.cuda.is_available():
        return rates_of(torch.device("cuda", torch.cuda.current_device()))
    return rates_named(device or USUAL_DEVICE)


def device_bytes(device: str) -> int:
    """Memory of the named device in all; unnamed, of the one that is here, else of the usual one."""
    if not device and torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    name = device or USUAL_DEVICE
    if name not in DEVICE_BYTES:
        raise ValueError(f"the memory of {name} is not known here; give a budget in bytes, as in 12GiB")
    return DEVICE_BYTES[name]


def bytes_of(budget: Budget, device: str) -> int:
    """A budget as bytes of a device that need not be here."""
    if budget.bytes is None:
        return int((budget.fraction or 1.0) * device_bytes(device))
    here = torch.cuda.is_available() and not device
    name = torch.cuda.get_device_name() if here else device or USUAL_DEVICE
    known = device_bytes("") if here else DEVICE_BYTES.get(name)
    if known is not None and budget.bytes > known:
        raise ValueError(f"memory={size_text(budget.bytes)} is more than {name} has ({size_text(known)}); give a smaller budget")
    return budget.bytes


def check(budget: Budget, device: str, optimizer: str) -> None:
    """ValueError for what no prediction can be made with, before a model is imagined."""
    rates_for(device)
    bytes_of(budget, device)
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"nothing is known of an optimizer {optimizer!r}; there are {', '.join(OPTIMIZERS)}")


@dataclass(frozen=True)
class Surveyed:
    """A captured module of an imagined model, with what is known of its graph."""

    path: str
    kind: str  # class name
    role: str  # block, head, leaf, whole
    survey: Survey


def surveyed(model: nn.Module) -> list[Surveyed]:
    """The captured modules of a model whose graphs have a backward, in its order."""
    return [
        Surveyed(path, type(module).__name__, record.kind, survey)
        for path, module in model.named_modules()
        for record in attached(module)
        if (survey := survey_of(record)) is not None
    ]


def standing(model: nn.Module, optimizer: str) -> dict[str, int]:
    """Bytes that live through the whole step, by what they are; each memory once."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return {
        "weights": sum(size for _, size in _storages(_weights(model))),
        "optimizer state": sum(map(OPTIMIZERS[optimizer], trained)),
    }


def _weights(model: nn.Module) -> Iterator[Tensor]:
    """Parameters with what quantized ones carry, and buffers."""
    for parameter in model.parameters():
        yield parameter
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            for part in (state, getattr(state, "state2", None)):
                yield from (value for value in vars(part).values() if isinstance(value, Tensor)) if part is not None else ()
    yield from model.buffers()


def _storages(tensors: Iterable[Tensor]) -> Iterator[tuple[int, int]]:
    """(identity, bytes) of the distinct storages. A storage of a fake tensor has no address, but a size."""
    seen: dict[int, object] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in seen:
            seen[key] = storage
            yield key, storage.nbytes()


def predicted(model: nn.Module, budget: Budget, setup: Setup) -> MemoryPlan:
    """The plan that the imagined model would get, trained so, and what other budgets would cost.

    ``BudgetTooSmall`` where nothing fits; UnsupportedGraph where no block could be surveyed.
    """
    rates = rates_for(setup.device)
    limit = bytes_of(budget, setup.device)
    margin = int(limit * (AUTO_MARGIN if budget.auto else MARGIN))
    problem, plan = fastest_plan(lambda tiles: problem_of(model, setup.optimizer, rates, tiles=tiles), limit,
                                 setup.device or USUAL_DEVICE, margin=margin, rates=rates.name)
    plan.frontier = frontier(problem, BUDGETS_SHOWN)
    plan.notes.append("predicted without a step: when the model runs, its first steps are measured and the plan is corrected")
    away = sum(block.point.offloaded_bytes for block in plan.blocks)
    if away:
        plan.notes.append(f"{size_text(away)} wait on the host, of which half of what is available is taken at most "
                          "(FXFUSE_HOST_MEMORY): with less, tensors stay on the device, and the plan is another")
    return plan


def problem_of(model: nn.Module, optimizer: str, rates: Rates, *, tiles: bool = False) -> Problem:
    """What the planner needs to know of an imagined model whose forward has run."""
    found = surveyed(model)
    groups: dict[Survey, Group] = {}
    blocks = [module for module in found if module.role in PLANNED]
    for place, module in enumerate(blocks):
        known = groups.get(module.survey)
        if known is None:
            single = sum(other.survey is module.survey for other in blocks) == 1
            block = module.survey.block(Sizes(module.survey.compiled_for), tiles=tiles, single=single)
            known = groups[module.survey] = Group(module.kind, [], [], block)
        known.places.append(place)
        known.paths.append(module.path)
    if not blocks:
        raise UnsupportedGraph(
            f"no block of {type(model).__name__} has a training graph that a memory plan could be made for; explain it without memory"
        )
    rest = [module.survey.block(Sizes(module.survey.compiled_for)) for module in found if module.role not in PLANNED]
    outside = _outside(model, {module.path for module in blocks}, rest, optimizer)
    return Problem(list(groups.values()), outside, rates=rates)


def _outside(model: nn.Module, inside: Collection[str], rest: Iterable[Block], optimizer: str) -> Outside:
    """Weights and their gradients, and the graphs around the blocks: final norm and head."""
    apart = [parameter for name, parameter in model.named_parameters()
             if parameter.requires_grad and not any(name.startswith(f"{path}.") for path in inside)]
    saved = transient = 0
    ms = 0.0
    for graph in rest:
        point = graph.points[0]
        saved += point.saved_bytes
        transient = max(transient, point.forward_transient_bytes - point.saved_bytes, point.backward_transient_bytes)
        ms += graph.forward_ms + graph.backward_ms
    return Outside(standing(model, optimizer), sum(size for _, size in _storages(apart)), 0, saved + transient, ms)
