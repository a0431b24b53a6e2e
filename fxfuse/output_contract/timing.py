"""Hooks that wait for a gradient only to know when the backward begins.

Fully sharded modules put a hook on each of their outputs that requires a gradient: whichever the backward comes through first makes
them gather their weights. The loss is such an output too and has the same hook, so nothing is lost where no gradient comes through
the logits; where one does (they were read, or an ``autograd.Function`` took them), the hook runs before anything behind it.
DeepSpeed's engine hooks its outputs in the same way. (Where a script calls ``loss.backward()`` and not the engine's, each hook on the
gradient's way divides by the accumulated steps as well: in eager once on the loss and once more on the logits, here once.)

Anybody else who puts a hook on logits waits for a gradient of the loss that never comes, and is told so.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType

from torch import Tensor
from torch.utils.hooks import RemovableHandle

_TIMERS = ("torch.distributed.fsdp.", "deepspeed.runtime.utils")
# Between the caller of a tensor's method and the answer to it.
_BETWEEN = (__name__.rpartition(".")[0] + ".", "torch._tensor", "torch.overrides", "torch._dynamo.", "torch.utils._contextlib")


def asked_by_a_timer() -> bool:
    """Is the method of a tensor that is being answered called by code which hooks outputs for the time alone."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _module(frame).startswith(_BETWEEN):
        frame = frame.f_back
    return _module(frame).startswith(_TIMERS)


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


@dataclass(frozen=True)
class Relay:
    """One hook on several tensors that stand for the same value; its one handle takes it off all of them."""

    hooks: OrderedDict[int, Callable] = field(default_factory=OrderedDict)

    def take(self, hook: Callable) -> RemovableHandle:
        handle = RemovableHandle(self.hooks)
        self.hooks[handle.id] = hook
        return handle

    def __call__(self, gradient: Tensor) -> Tensor:
        for hook in list(self.hooks.values()):
            given = hook(gradient)
            gradient = gradient if given is None else given
        return gradient

    def on(self, value: Tensor) -> Tensor:
        """The value, hooked where a gradient can come through it: a step of a lazy tensor."""
        if value.requires_grad:
            value.register_hook(self)
        return value
