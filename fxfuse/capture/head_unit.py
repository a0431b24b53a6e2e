"""An output projection that is a unit of FSDP2 by itself, or with the last norm, as accelerate's plugin makes it.

FSDP2 gathers a unit's weights in a hook before its module and is done with them in a hook after it. Around the projection both lie in
the middle of the head, between the hidden states and the loss, and cut it in two. So for the length of a captured call they are called
around what is fused: the weights are gathered as soon as the backbone has run, when nothing is left to do before the projection, and
the hook after it gets what the head gives, before the hooks of the model around it. That one waits for the gradient of an output to
begin its backward; the loss is the first to have one. The collectives are eager's, in eager's order.

Between the two the weights lie there whole. So it is done for units that keep theirs until the backward (which accelerate chooses for
the head: ``reshard_after_forward=False``). Other units run as they are, their loss on logits that are kept, and the report says so.

A unit of the projection alone gives its weights back at the end of the backward, where FSDP2 looks after what no input's gradient
reached; not as soon as the head's gradient is there.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

GATHERED_APART = (
    "{} is a unit of FSDP2 by itself, which gives its weight back before the loss is computed: the loss is computed on logits that are "
    "kept. Where the unit keeps its weight until the backward (reshard_after_forward=False), or the head belongs to the unit of the "
    "whole model, logits are never made"
)


@dataclass
class Unit:
    """A projection, and where in its dictionaries of hooks FSDP2's are.

    before, after: keys. inputs, output: the dtypes to which mixed precision casts what goes in and comes out, if any.
    """

    projection: nn.Linear
    before: int
    after: int
    inputs: torch.dtype | None
    output: torch.dtype | None


class _Apart:
    """The hooks of a unit while casts are in their places, and the second of them comes first after the head."""

    def __init__(self, unit: Unit, head: nn.Module) -> None:
        self.unit, self.head, self.gathered = unit, head, False
        before, after = unit.projection._forward_pre_hooks, unit.projection._forward_hooks
        self.gathers, self.finishes = before[unit.before], after[unit.after]
        before[unit.before], after[unit.after] = inputs_cast(unit.inputs), output_cast(unit.output)
        head._forward_hooks[unit.after] = finish
        head._forward_hooks.move_to_end(unit.after, last=False)

    def put_back(self) -> None:
        self.unit.projection._forward_pre_hooks[self.unit.before] = self.gathers
        self.unit.projection._forward_hooks[self.unit.after] = self.finishes
        self.head._forward_hooks.pop(self.unit.after, None)


class _Running(threading.local):
    """Of the captured heads that are running on this thread."""

    def __init__(self) -> None:
        self.heads: list[_Apart] = []


_running = _Running()


def gathered_apart(head: nn.Module) -> str | None:
    """What to say where an output projection right below ``head`` is a unit that stays as it is, or None."""
    name = _name_of_projection(head)
    return GATHERED_APART.format(name) if name and unit_of(head) is None else None


def unit_of(head: nn.Module) -> Unit | None:
    """The output projection right below ``head`` with its hooks, if it is a unit of FSDP2 that keeps its weights until the backward."""
    name = _name_of_projection(head)
    if not name:
        return None
    projection: Any = getattr(head, name)
    state = projection._get_fsdp_state()
    before = _key(state, "_pre_forward_hook_handle", projection._forward_pre_hooks)
    after = _key(state, "_post_forward_hook_handle", projection._forward_hooks)
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]  # (before 2.13 there was one)
    if before is None or after is None or any(getattr(group, "post_forward_mesh_info", 0) is not None for group in groups):
        return None
    policy = state._mp_policy
    return Unit(projection, before, after, policy.param_dtype if policy.cast_forward_inputs else None, policy.output_dtype)


def _name_of_projection(head: nn.Module) -> str:
    library = sys.modules.get("torch.distributed.fsdp")
    if library is None:
        return ""
    units = (name for name, child in head.named_children() if isinstance(child, library.FSDPModule) and isinstance(child, nn.Linear))
    return next(units, "")


def _key(state: Any, handle: str, hooks: Any) -> int | None:
    """Under which key ``hooks`` holds what FSDP2 registered under one of its handles."""
    kept = getattr(state, handle, None)
    for each in getattr(kept, "handles", (kept,)):
        if each is not None and each.hooks_dict_ref() is hooks and each.id in hooks:
            return int(each.id)
    return None


@contextmanager
def hooks_around(head: nn.Module) -> Iterator[None]:
    """Around a captured call of ``head``: its projection's hooks of FSDP2 are called around what is fused."""
    unit = unit_of(head)
    if unit is None:
        yield
        return
    _running.heads.append(_Apart(unit, head))
    try:
        yield
    finally:
        _running.heads.pop().put_back()


def gather() -> None:
    """A backbone of the running head has run: gather the weights of the projection, once."""
    hooks = _running.heads[-1] if _running.heads else None
    if hooks is not None and not hooks.gathered:
        hooks.gathered = True
        hooks.gathers(hooks.unit.projection, (), {})


def _finish(head: nn.Module, given: Any, output: Any) -> None:
    hooks = _running.heads[-1]
    hooks.finishes(hooks.unit.projection, given, output)


finish = torch.compiler.disable(_finish, reason="a hook of FSDP2")


@functools.cache
def inputs_cast(dtype: torch.dtype | None) -> Callable:
    """A hook before a module that casts what it is given, as FSDP2's does; written to be traced. One for each dtype."""

    def cast(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        return None if dtype is None else tree_map(functools.partial(_in, dtype), (args, kwargs))

    return cast


@functools.cache
def output_cast(dtype: torch.dtype | None) -> Callable:
    """A hook after a module that casts its result, as FSDP2's does; written to be traced."""

    def cast(module: nn.Module, given: Any, output: Any) -> Any:
        return None if dtype is None else tree_map(functools.partial(_in, dtype), output)

    return cast


def _in(dtype: torch.dtype, value: Any) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
