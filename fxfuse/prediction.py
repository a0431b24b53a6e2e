"""What a training step would hold and take on a device that need not be here, from surveys of an imagined model's graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fxfuse.errors import UnsupportedGraph
from fxfuse.memory.budget import Budget
from fxfuse.memory.costs import TABLE, Rates, rates_named, rates_of
from fxfuse.memory.plan import MemoryPlan, size_text
from fxfuse.memory.points import Block
from fxfuse.memory.sizes import Sizes
from fxfuse.memory.surveys import survey_of
from fxfuse.reporting.records import GraphRecord, attached

if TYPE_CHECKING:
    from fxfuse.explanation import Setup

USUAL_DEVICE = "NVIDIA H200"
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
    name = device or USUAL_DEVICE
    known = DEVICE_BYTES.get(name) if device or not torch.cuda.is_available() else device_bytes("")
    if known is not None and budget.bytes > known:
        raise ValueError(f"memory={size_text(budget.bytes)} is more than {name} has ({size_text(known)}); give a smaller budget")
    return budget.bytes


@dataclass(frozen=True)
class Surveyed:
    """A captured module of an imagined model, with what is known of its graph."""

    path: str
    kind: str  # class name
    role: str  # block, head, leaf, whole
    block: Block


def surveyed(model: nn.Module) -> list[Surveyed]:
    """The captured modules of a model, in its order."""
    found: list[Surveyed] = []
    known: dict[int, Block] = {}
    for path, module in model.named_modules():
        for record in attached(module):
            survey = survey_of(record)
            if survey is not None:
                if id(survey) not in known:
                    known[id(survey)] = survey.block(Sizes(survey.compiled_for))
                found.append(Surveyed(path, type(module).__name__, record.kind, known[id(survey)]))
    return found


def unsurveyed(model: nn.Module) -> list[GraphRecord]:
    """Graphs of blocks that no plan can be made for."""
    records = [record for module in model.modules() for record in attached(module)]
    return [record for record in dict.fromkeys(records) if record.kind in ("block", "whole") and survey_of(record) is None]


def standing(model: nn.Module, optimizer: str) -> dict[str, int]:
    """Bytes that live through the whole step, by what they are; each memory once."""
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"nothing is known of an optimizer {optimizer!r}; there are {', '.join(OPTIMIZERS)}")
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
    """The plan that the imagined model would get, trained so. UnsupportedGraph where no block could be surveyed."""
    raise UnsupportedGraph("memory budgets are not explained yet")


