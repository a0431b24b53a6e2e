"""Adapters whose forward Dynamo does not trace, and what it traces in its place.

PEFT's Hadamard and Kronecker adapters (LoHa, LoKr) draw a number in each training forward and ask whether it is above their
``module_dropout``, also where that is zero; a trace cannot follow a question about values. Its adapters of whole parameters
(``target_parameters``: experts) change their base layer into a parametrized one, and back, in each forward. With either no block that
had such an adapter was one graph.

So an instance of such a layer gets a ``forward`` that says the same in words that can be traced, and outside of a trace is PEFT's own.
It is a mark as others are (marks.py), put there before the first graph of a model with such adapters is made; PEFT's classes and
functions are not touched.

An adapter that is left out of some steps by chance (``module_dropout`` above zero) has no gradient then, where a trace would have
zeros: its block is not captured, and the report says why.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse._torch import graph_break

LEFT_OUT = "an adapter is left out of some steps by chance (module_dropout): it has no gradient there, and a graph would give it zeros"
NARROW = "an adapter of a parameter whose dtype does not add up (8 bits): PEFT adds to it in another dtype"
_ADDS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def adapters_are_there() -> bool:
    """Whether anybody has imported such a layer."""
    return any(module in sys.modules for module, _, _ in _LAYERS)


def traceable_forward(layer: nn.Module) -> Callable | None:
    """The forward that stands in for the one of ``layer``, one for each class; None where that is traced as it is."""
    kind: Any = type(layer)
    traced = _traced_of(kind)
    return None if traced is None else _either(type(layer).forward, traced)


@functools.cache
def _traced_of(cls: Any) -> Callable | None:
    for module, name, traced in _LAYERS:
        base = getattr(sys.modules.get(module), name, None)
        if base is not None and issubclass(cls, base):
            return traced
    return None


@functools.cache
def _either(forward: Callable, traced: Callable) -> Callable:
    """``forward``, and in a trace ``traced``."""

    @functools.wraps(forward)
    def either(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return traced(self, forward, x, *args, **kwargs)
        return forward(self, x, *args, **kwargs)

    return either


def added_activations(self: Any, forward: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """base(x) + the sum over active adapters of x delta', delta [out, in] in the adapter's dtype; in the dtype of x.

    A number is drawn for each, as in eager, so that what is drawn later is the same; and decides as in eager (it is 0, the one value
    for which eager leaves the adapter out, once in 2^24 times). Were it not read, it would not be drawn.
    """
    if not self.training or self.disable_adapters or self.merged:
        return forward(self, x, *args, **kwargs)
    result = self.base_layer(x, *args, **kwargs)
    for name in self.active_adapters:
        if name not in self._available_adapters:
            continue
        if self.module_dropout[name]:
            graph_break(msg=LEFT_OUT)
        wanted = torch.rand(1) > 0
        added = self._get_delta_activations(name, x, *args, **kwargs)
        result = result + added * wanted.to(added.device, added.dtype)
    return result.to(x.dtype)


def adapted_parameters(self: Any, forward: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The base layer as a function of its parameters, those with active adapters being W + s B A.

    PEFT nests one layer in another where several parameters of a module have adapters.
    """
    changed: dict[str, Tensor] = {}
    layer = self
    while hasattr(layer, "parameter_name"):
        if layer.disable_adapters and layer.merged:  # (eager takes the adapter out of the parameter again)
            return forward(self, x, *args, **kwargs)
        names = [] if layer.disable_adapters or layer.merged else [name for name in layer.active_adapters if name in layer.lora_A]
        if names:
            changed[layer.parameter_name] = _adapted(layer, names)
        layer = layer.base_layer
    return torch.func.functional_call(layer, changed, (x, *args), kwargs) if changed else layer(x, *args, **kwargs)


def _adapted(layer: Any, names: list[str]) -> Tensor:
    """The parameter with its adapters added: in one product where PEFT does so (experts with one adapter), in its dtype."""
    weight: Tensor = layer.get_param()
    if weight.dtype not in _ADDS:
        graph_break(msg=NARROW)
    if len(names) == 1 and layer.num_experts > 1 and hasattr(layer, "get_delta_factors"):
        left, right, scaling = layer.get_delta_factors(names[0])
        with torch.autocast(device_type=weight.device.type, enabled=False):
            return torch.baddbmm(weight, left, right, alpha=scaling)
    delta = layer.get_delta_weight(names[0])
    for name in names[1:]:
        delta = delta + layer.get_delta_weight(name)
    return weight + delta


_LAYERS = (
    ("peft.tuners.loha.layer", "LoHaLayer", added_activations),
    ("peft.tuners.lokr.layer", "LoKrLayer", added_activations),
    ("peft.tuners.lora.layer", "ParamWrapper", adapted_parameters),
)
