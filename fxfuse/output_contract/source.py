"""How the value of an output that was not computed can still be had, and until when.

A source holds a slice of the original graph and the very tensors that the slice reads: the hidden states, with their
autograd graph, and the weights. Its value is then what eager would have given, gradients included. Three things end that:
a tensor is changed in place (an optimizer step), its memory is gone (a sharded weight), or the model runs forward again.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.optim.optimizer import register_optimizer_step_post_hook

from fxfuse._torch import saved_hooks_enabled
from fxfuse.errors import DoubleBackwardError, OutputContractError
from fxfuse.output_contract.stamp import stamp

if TYPE_CHECKING:
    from fxfuse.linear_loss.lazy_output import LazyOutput

REMEDY = "fxfuse.optimize(model, logits='always') makes them an ordinary output"
NEXT_FORWARD = "the model ran forward again since, and what they are computed from was let go"
STEPPED = "an optimizer step has changed weights that they are computed from; read them before it"
NEVER = "the model was optimized with logits='never'"


@dataclass
class Reads:
    """How often an output was read, over all calls of its graph."""

    site: str
    mode: str
    read: int = 0
    materialised: int = 0
    first_reader: str = ""

    def __str__(self) -> str:
        if self.mode == "never":
            return f"logits of {self.site}: never computed; reading them is an error"
        first = f", first by {self.first_reader}" if self.first_reader else ""
        return f"logits of {self.site}: lazy, read {self.read} times (materialised: {self.materialised}{first})"


class Source:
    """The value of one output of one call, computed on demand.

    described: the slice that computes it
    picked:    the values of the slice's inputs in this call; None once they were let go
    """

    def __init__(self, described: LazyOutput, arguments: Sequence[Any], reads: Reads) -> None:
        self.described = described
        self.reads = reads
        self.closed = NEVER if reads.mode == "never" else ""
        self.shape = described.sizes(described.pick(arguments))
        self.picked = None if self.closed else described.pick(arguments)
        self.stamps = [stamp(value) for value in self.picked or ()]
        self.shells: list[weakref.ref[Tensor]] = []  # the tensors whose autograd history leads here
        watch_optimizers()
        _open.add(self)

    def compute(self) -> Tensor:
        """The tensor that the graph would have returned, with its autograd history."""
        picked = self.inputs()
        self.reads.materialised += 1
        # A checkpoint around the read counts what is saved inside of it; its recomputation finds the value computed already.
        # (Where hooks are disabled, within torch.func.grad, there are none to be kept out.)
        unhooked = saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor) if saved_hooks_enabled() else nullcontext()
        with torch.inference_mode(False), torch.enable_grad(), unhooked:
            value = self.described.compute(picked)
        if value.shape != self.shape or value.dtype != self.described.dtype:
            raise OutputContractError(
                f"the logits of {self.reads.site} were promised as {self.described.dtype} of shape {self.shape} and came out as "
                f"{value.dtype} of shape {tuple(value.shape)}; {REMEDY}"
            )
        return value

    def pull_back(self, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the slice's differentiable inputs, given that of its output: autograd's own, of the slice."""
        refuse_second_derivative()
        picked = [
            value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value for value in self.inputs()
        ]
        with torch.enable_grad():
            output = self.described.compute(picked)
        return torch.autograd.grad(output, differentiable(picked), gradient, allow_unused=True)

    def inputs(self) -> tuple[Any, ...]:
        """The values of the slice's inputs, if they are still what they were. OutputContractError says why not."""
        reason = self.why_gone()
        if reason:
            raise OutputContractError(f"the logits of {self.reads.site} cannot be read: {reason}; {REMEDY}")
        assert self.picked is not None
        return self.picked

    def why_gone(self) -> str:
        """Why the value cannot be had any more, or nothing."""
        if self.closed or self.picked is None:
            return self.closed
        names = [node.name for node in self.described.graph.graph.nodes if node.op == "placeholder"]
        for name, value, before in zip(names, self.picked, self.stamps, strict=True):
            if before is not None and not before.fits(value):
                return (f"{name}, which they are computed from, was changed or freed after the forward (written to in place, an "
                        "adapter merged, a sharded weight given back); read them before that")
        return ""

    def close(self, reason: str) -> None:
        """Let go of everything. Values that were computed stay with whoever holds them."""
        if self.closed:
            return
        self.closed, self.picked, self.stamps = reason, None, []
        _open.discard(self)
        for reference in self.shells:
            shell = reference()
            if shell is not None:
                shell.forget()  # type: ignore[attr-defined]
        self.shells.clear()


def differentiable(values: Sequence[Any]) -> list[Tensor]:
    """The tensors among ``values`` that require a gradient."""
    return [value for value in values if isinstance(value, Tensor) and value.requires_grad]


def refuse_second_derivative() -> None:
    """In the backward of a lazy output: raise where the gradient itself is to be differentiated."""
    if torch.is_grad_enabled():
        raise DoubleBackwardError(
            "logits that an autograd function took unread give first derivatives only, and a second one was asked for; "
            f"read them first (logits[:]), or: {REMEDY}"
        )


_open: weakref.WeakSet[Source] = weakref.WeakSet()


@functools.cache
def watch_optimizers() -> None:
    """Be told of every optimizer step: fused and 8-bit optimizers write to weights without counting up their version."""
    register_optimizer_step_post_hook(after_step)


def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Close the sources that hold weights of ``optimizer``."""
    if len(_open) == 0:
        return
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for source in list(_open):
        if any(id(value) in stepped for value in source.picked or ()):
            source.close(STEPPED)


_last: weakref.WeakKeyDictionary[Any, list[weakref.ref[Source]]] = weakref.WeakKeyDictionary()


def remember(owner: Any, source: Source) -> None:
    """``source`` belongs to the present forward of ``owner`` (a module, or a compiled graph outside of one)."""
    _last.setdefault(owner, []).append(weakref.ref(source))


def bytes_behind(model: torch.nn.Module, device: torch.device) -> int:
    """Bytes of activations on a device that are held so that logits of the model's last forward can be had from them."""
    own = {id(module) for module in model.modules()}
    sources = [reference() for owner, references in list(_last.items()) if id(owner) in own for reference in references]
    storages = {
        value.untyped_storage()._cdata: value.untyped_storage().nbytes()
        for source in sources if source is not None
        for value in source.picked or ()
        if isinstance(value, Tensor) and value.requires_grad and not value.is_leaf and value.device == device
    }  # fmt: skip
    return sum(storages.values())


def next_forward(owner: Any) -> None:
    """``owner`` begins a forward: what its former ones hold on to is let go."""
    if torch.compiler.is_compiling():
        return
    for reference in _last.pop(owner, ()):
        source = reference()
        if source is not None:
            source.close(NEXT_FORWARD)
