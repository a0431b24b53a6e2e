"""A tensor that is computed when something reads it.

It has a shape, a dtype, a device and a place in autograd, and no memory. Questions about those are answered; casts,
copies and ``detach`` give another such tensor; everything else computes the value first and then does what was asked on
the real tensor. That happens in ``__torch_function__``, above autograd: the value has the history that eager's has, so its
gradients reach the hidden states and the weights.

What does not pass through ``__torch_function__`` sees the tensor itself: an ``autograd.Function`` that takes it, the reducer
of DistributedDataParallel, collectives. For those the tensor is a node of the autograd graph, whose backward is autograd's
own over the slice, and ``__torch_dispatch__`` gives them the value.
"""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from fxfuse._torch import DisableTorchFunctionSubclass, without_transforms
from fxfuse.errors import OutputContractError
from fxfuse.output_contract.queries import (
    AWAITS_GRADIENT,
    COPIES,
    DETACHES,
    NOTHING_TO_DO,
    PRINTS,
    QUERIES,
    TYPE_NAME,
    cast_to,
)
from fxfuse.output_contract.source import REMEDY, Source, differentiable, refuse_second_derivative
from fxfuse.output_contract.timing import Relay, asked_by_a_timer

OUR_FOLDERS = str(Path(torch.__file__).parent), str(Path(__file__).parents[1])
Pull = Callable[[Tensor], Sequence[Tensor | None]]


class LazyTensor(Tensor):
    """A tensor whose value is computed from ``source``, and then by ``steps``, when it is read."""

    _source: Source
    _steps: tuple[Callable[[Tensor], Tensor], ...]
    _parent: weakref.ref[LazyTensor] | None  # what the last step is taken from, while somebody else holds it
    _made: list[weakref.ref[LazyTensor]]  # what was made of it, uncomputed
    _own_node: Any  # the autograd node it was made with; another one means that an autograd.Function gave it on
    _value: Tensor | None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        return answer(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Below autograd: values only."""
        kwargs = kwargs or {}
        refuse_lost_write(written(func, args, kwargs))
        args, kwargs = tree_map(bare_value, (args, kwargs))
        return func(*args, **kwargs)

    def forget(self) -> None:
        """Let go of the autograd history, which leads to the hidden states and the weights."""
        if self._value is None:
            with DisableTorchFunctionSubclass():
                self.detach_()
            self._own_node = None


class Link(torch.autograd.Function):
    """A tensor made by ``make`` as a function of others; ``pull`` turns its gradient into theirs."""

    @staticmethod
    def forward(ctx: Any, make: Callable[[], Tensor], pull: Pull, *inputs: Tensor) -> Tensor:
        ctx.pull = pull
        return make()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:  # type: ignore[override]
        return None, None, *ctx.pull(gradient)


def lazy_tensor(source: Source) -> LazyTensor:
    """The output that ``source`` computes, uncomputed."""
    described = source.described
    make = partial(shell, source.shape, described.dtype, described.device)
    inputs = differentiable(source.picked or ()) if described.requires_grad else []
    return dressed(make, source.pull_back, inputs, source, (), None)


def derived(tensor: LazyTensor, step: Callable[[Tensor], Tensor], dtype: torch.dtype) -> LazyTensor:
    """What ``step`` (linear, shapes unchanged) makes of ``tensor``, uncomputed."""
    tracked = torch.is_grad_enabled() and tensor.requires_grad

    def pull(gradient: Tensor) -> Sequence[Tensor | None]:
        refuse_second_derivative()
        before = torch.empty(shape, dtype=given, device=device, requires_grad=True)
        with torch.enable_grad():
            return torch.autograd.grad(step(before), [before], gradient)

    shape, given, device = tensor.shape, tensor.dtype, tensor.device
    make = partial(shell, shape, dtype, device)
    steps = (*tensor._steps, step if tracked else partial(untracked, step))
    made = dressed(make, pull, [tensor] if tracked else [], tensor._source, steps, weakref.ref(tensor))
    tensor._made.append(weakref.ref(made))
    return made


def dressed(make: Callable[[], Tensor], pull: Pull, inputs: Sequence[Tensor], source: Source, steps: tuple,
            parent: weakref.ref | None) -> LazyTensor:
    """A new lazy tensor with its place in autograd."""
    tensor: Any = Link.apply(make, pull, *inputs) if inputs else make()
    tensor._source, tensor._steps, tensor._parent, tensor._made, tensor._value = source, steps, parent, [], None
    tensor._own_node = raw_node(tensor)
    source.shells.append(weakref.ref(tensor))
    return tensor


def shell(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return Tensor._make_wrapper_subclass(LazyTensor, shape, dtype=dtype, device=device)  # type: ignore[attr-defined]


def untracked(step: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    with torch.no_grad():
        return step(tensor.detach())


def raw_node(tensor: Tensor) -> Any:
    """The autograd node that gave this very tensor."""
    with DisableTorchFunctionSubclass():
        return tensor.grad_fn


@torch.compiler.disable
def answer(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What ``func`` gives for arguments of which some are lazy."""
    first = args[0] if args else None
    if type(first) is LazyTensor:
        if func in QUERIES or (func is TYPE_NAME and len(args) == 1 and not kwargs):
            with DisableTorchFunctionSubclass():
                return func(first if first._value is None else linked(first), *args[1:], **kwargs)
        if func in AWAITS_GRADIENT:
            if func is Tensor.register_hook and asked_by_a_timer():
                return hooked(first, *args[1:], **kwargs)
            refuse_gradient_of(first)
        if first._value is None:
            result = still_lazy(func, first, args, kwargs)
            if result is not None:
                return result
    if func is torch.autograd.grad:
        refuse_gradient_of(kwargs.get("inputs", args[1] if len(args) > 1 else ()))
    args, kwargs = tree_map(real, (args, kwargs))
    return func(*args, **kwargs)


def still_lazy(func: Any, tensor: LazyTensor, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The answer to a call that reads no values, or None."""
    if func in PRINTS and tensor._source.why_gone():
        return f"LazyTensor(shape={tuple(tensor.shape)}, dtype={tensor.dtype}; {tensor._source.why_gone()})"
    if func in NOTHING_TO_DO and len(args) == 1 and not kwargs:
        return tensor
    if func in DETACHES:
        with torch.no_grad():
            return derived(tensor, Tensor.detach, tensor.dtype)
    if func in COPIES and len(args) == 1 and not kwargs:
        return derived(tensor, Tensor.clone, tensor.dtype)
    dtype = cast_to(func, args, kwargs)
    if dtype is None:
        return None
    return tensor if dtype == tensor.dtype else derived(tensor, lambda value: value.to(dtype), dtype)


def hooked(tensor: LazyTensor, hook: Callable) -> RemovableHandle:
    """Put a hook on the tensor's autograd node and on its value, which has a history of its own."""
    relay = Relay()
    with DisableTorchFunctionSubclass():
        tensor.register_hook(relay)
    if tensor._value is not None:
        relay.on(tensor._value)
    elif tensor._parent is not None:  # the last step is what the value differs by from the parent's
        *before, last = tensor._steps
        tensor._steps = (*before, lambda value: relay.on(last(value)))
    else:
        tensor._steps = (*tensor._steps, relay.on)
    return relay.take(hook)


def real(value: Any) -> Any:
    """The real tensor of a lazy one; anything else as it is."""
    return read(value) if type(value) is LazyTensor else value


@torch.compiler.disable
def read(tensor: LazyTensor) -> Tensor:
    """The real tensor, computed at the first read, with its autograd history."""
    tensor._source.reads.read += 1
    if tensor._value is None and not tensor._source.reads.first_reader:
        tensor._source.reads.first_reader = reader()
    with without_transforms():  # torch.func's: what is computed within one is not to be used after it
        return value_of(tensor)


def value_of(tensor: LazyTensor) -> Tensor:
    """The value, computed now if it was not, by way of the parent where that is still in somebody's hands."""
    parent = tensor._parent() if tensor._parent is not None else None
    if tensor._value is None and parent is not None:
        value_of(parent)  # which settles what was made of it
    if tensor._value is None:
        settle(tensor, computed(tensor, None if parent is None else parent._value))
    return linked(tensor)


def settle(tensor: LazyTensor, value: Tensor) -> None:
    """``value`` is the tensor's for good, and may be written to from now on: what was made of it before is taken from it first."""
    tensor._value = value
    linked(tensor)
    made, tensor._made = [reference() for reference in tensor._made], []
    for other in made:
        if other is not None and other._value is None:
            settle(other, computed(other, value))


def linked(tensor: LazyTensor) -> Tensor:
    """The value, behind the autograd.Function that has given the tensor on since, if one has: the gradient must pass through it."""
    assert tensor._value is not None
    node = raw_node(tensor)
    if node is not tensor._own_node:
        with torch.enable_grad():
            tensor._value, tensor._own_node = Link.apply(tensor._value.detach, lambda gradient: (gradient,), tensor), node
    return tensor._value


def computed(tensor: LazyTensor, parents: Tensor | None) -> Tensor:
    """The value of ``tensor``, from its parent's, or from the source."""
    value, steps = (tensor._source.compute(), tensor._steps) if parents is None else (parents, tensor._steps[-1:])
    with torch.inference_mode(False), torch.enable_grad():
        for step in steps:
            value = step(value)
    return value


def bare_value(value: Any) -> Any:
    """The value of a lazy tensor without history; anything else as it is."""
    if type(value) is not LazyTensor:
        return value
    if value._value is not None:
        return value._value.detach()
    value._source.reads.read += 1
    result = value._source.compute()
    for step in value._steps:
        result = step(result)
    result = result.detach()
    if not has_history(value):  # then this is the value for good
        settle(value, result)
    return result


def has_history(tensor: Tensor) -> bool:
    with DisableTorchFunctionSubclass():
        return tensor.requires_grad


def written(func: Any, args: tuple, kwargs: dict[str, Any]) -> list[Any]:
    """What an op below autograd writes to, as far as it says so. Collectives do not say: it is their first argument."""
    if func.namespace == "c10d":
        return tree_leaves(args[:1]) if func._opname.endswith("_") else []
    if not func._schema.is_mutable:
        return []
    given = [*zip(func._schema.arguments, args, strict=False), *((a, kwargs.get(a.name)) for a in func._schema.arguments)]
    return [leaf for argument, value in given if argument.is_write for leaf in tree_leaves(value)]


def refuse_lost_write(targets: Sequence[Any]) -> None:
    """Raise where what is written would be forgotten: in a tensor whose value, with its history, is still to be computed."""
    for value in targets:
        if type(value) is LazyTensor and value._value is None and has_history(value):
            raise OutputContractError(
                f"the logits of {value._source.reads.site} are written to before they were computed; read them first "
                f"(logits[:]), or: {REMEDY}"
            )


def refuse_gradient_of(tensors: Any) -> None:
    """Raise where the gradient of a loss with respect to logits is awaited: the fused loss does not pass through them."""
    for value in tree_leaves(tensors):
        if type(value) is LazyTensor:
            raise OutputContractError(
                f"the gradient with respect to the logits of {value._source.reads.site} was asked for, and the loss does not pass "
                f"through them (a function of logits[:] does); {REMEDY}"
            )


def reader() -> str:
    """The line outside of torch and fxfuse that reads."""
    for frame in reversed(traceback.extract_stack(limit=40)):
        if not frame.filename.startswith((*OUR_FOLDERS, "<")):
            return f"{Path(frame.filename).name}:{frame.lineno}"
    return "code without a file"
