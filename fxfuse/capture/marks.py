"""The marks that an installation leaves on modules beside their compile slots, and how they are told.

A mark is an instance ``forward``, a method of a function made here once per class: copies of a module keep it,
bound to the copy, and pickles give back the class's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from fxfuse.capture.adapter_forwards import adapters_are_there, traceable_forward
from fxfuse.capture.collector import collector_paused
from fxfuse.capture.governor import governed
from fxfuse.capture.head_unit import gather
from fxfuse.capture.stack import opaque_forward

POSITION = "_fxfuse_position"
_marks: set[Any] = set()


@functools.cache
def disabled_forward(forward: Callable) -> Callable:
    """``forward``, which Dynamo leaves alone; under a memory budget, with its governor around it. What the head needs follows."""

    @functools.wraps(forward)
    def governed_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with collector_paused(torch.is_grad_enabled()):
            out = governed(self, functools.partial(forward, self), args, kwargs)
        gather()
        return out

    return torch.compiler.disable(governed_forward, reason="fxfuse captures blocks and head apart")


def keep_out(backbone: nn.Module) -> None:
    """Keep a backbone out of the trace of the head."""
    _mark(backbone, disabled_forward(type(backbone).forward))


def make_opaque(block: nn.Module, position: int) -> None:
    """Make a block one node of the trace of the forward that calls it."""
    _mark(block, opaque_forward(type(block).forward))
    vars(block)[POSITION] = position


def mark_adapters(model: nn.Module) -> None:
    """Give adapters whose forward cannot be traced one that can; those that have it already, or somebody else's, keep it."""
    below, found = [model] if adapters_are_there() else [], set()
    while below:  # (Module.modules() resumes a generator a level for each; a model has thousands of modules)
        module = below.pop()
        if id(module) in found:
            continue
        found.add(id(module))
        below += [child for child in module._modules.values() if child is not None]
        forward = None if "forward" in vars(module) else traceable_forward(module)
        if forward is not None:
            _mark(module, forward)


def is_mark(forward: Any) -> bool:
    """Whether an instance ``forward`` is one of ours."""
    return getattr(forward, "__func__", None) in _marks


def is_marked(module: nn.Module) -> bool:
    return is_mark(vars(module).get("forward"))


def unmark(module: nn.Module) -> bool:
    """Take our marks off a module; whether there were any."""
    found = vars(module).pop(POSITION, None) is not None
    if is_marked(module) or _is_own(vars(module).get("forward"), module):
        del vars(module)["forward"]
        found = True
    return found


def _is_own(forward: Any, module: nn.Module) -> bool:
    """Whether an instance ``forward`` is the class's own: what a pickle makes of a mark."""
    own = type(module).forward
    return isinstance(forward, MethodType) and forward.__self__ is module and forward.__func__ is own


def _mark(module: nn.Module, function: Callable) -> None:
    _marks.add(function)
    vars(module)["forward"] = MethodType(function, module)
