"""What a block's call is expected to give, before it has run: the trace of the forward around it has to know.

A block is taken to give what it is given: a tensor like the first one. That costs nothing and runs nothing, and is looked at when the
block has run. Of a kind that gives something else (a pair, another width), the forward is imagined on fake tensors, in a second trace:
it must not leave fakes in a cache, or count a counter. Blocks of one kind that are given the same are likenesses of one of them.
Whether they are is looked at when they run: an attribute may tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from fxfuse._torch import FakeTensor

# What a capture itself puts on modules while it runs.
OURS = ("_compiled_call_impl", "forward")
# The dictionaries that hold attributes and buffers, each with what it held.
Attributes = list[tuple[dict[str, Any], dict[str, Any]]]


class Stack(Protocol):
    """A running top-level forward.

    blocks:   in order, and the kind of each
    other:    kinds that give something else than they are given
    imagined: by kind and arguments, in one trace
    seen:     the same of one call: facts of what came out
    """

    blocks: list[nn.Module]
    kinds: list[tuple]
    other: set[tuple]
    imagined: dict[Any, Any]
    seen: dict[Any, Any]

    def run_block(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any: ...


class StackDeclined(Exception):
    """The forward around the blocks cannot be cut at them; the message is the reason."""


class OtherThanAssumed(StackDeclined):
    """A block does not give what it is given; its kind is now known to do otherwise."""


def declined_in(error: BaseException | None) -> StackDeclined | None:
    """What a tracer has wrapped up in errors of its own, if it is that."""
    while error is not None and not isinstance(error, StackDeclined):
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    return error


def expected(stack: Stack, position: int, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What the block at ``position`` would give, as fake tensors."""
    kind, block = stack.kinds[position], stack.blocks[position]
    if _holds_mutable((*args, *kwargs.values())):
        raise StackDeclined(f"{type(block).__name__} is given a list or a dictionary, which it may change")
    if kind not in stack.other:
        return _likeness(_first_tensor(args, kwargs), torch.is_grad_enabled() and _is_trained(block, args, kwargs))
    mode = next((leaf.fake_mode for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, FakeTensor)), None)
    key = id(mode), kind, *_given(args, kwargs)
    if key not in stack.imagined:
        stack.imagined[key] = _imagined(block, mode, args, kwargs)
        return stack.imagined[key]
    return tree_map(_likeness, stack.imagined[key])


def check(stack: Stack, position: int, out: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Whether the block at ``position`` gave what was expected. StackDeclined if not."""
    kind, block = stack.kinds[position], stack.blocks[position]
    name = type(block).__name__
    if kind not in stack.other:
        first = _first_tensor(args, kwargs)
        if not _is_like(out, first):
            stack.other.add(kind)
            raise OtherThanAssumed(f"what {name} gives cannot be told without running it")
        if out.requires_grad and not first.requires_grad and not _is_trained(block, args, kwargs):
            raise StackDeclined(f"what {name} gives requires a gradient for something that it is not given")
        return
    came = _outline(out)
    if stack.seen.setdefault((kind, *_given(args, kwargs)), came) != came:
        raise StackDeclined(f"blocks of the class {name}, given the same, give different things")


@contextmanager
def undone_if_declined(module: nn.Module) -> Iterator[None]:
    """A call is repeated where it is declined half-way: buffers, attributes and random numbers are then what they were before it."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    attributes = attributes_of(module)
    devices = sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
    states = [(index, torch.cuda.get_rng_state(index)) for index in devices]
    state = torch.get_rng_state()
    try:
        yield
    except StackDeclined:
        torch.set_rng_state(state)
        for index, of_device in states:
            torch.cuda.set_rng_state(of_device, index)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        put_back(attributes)
        raise


def attributes_of(module: nn.Module) -> Attributes:
    """The dictionaries that hold the attributes and buffers of a module and those inside, each with what it holds now."""
    return [(owner, dict(owner)) for inside in module.modules() for owner in (vars(inside), inside._buffers)]


def run_watched(block: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """What a block that may not be captured gives: Dynamo does not tell what it changes, so its attributes are looked at."""
    attributes = attributes_of(block)
    out = forward(*args, **kwargs)
    if _changed(attributes):
        raise StackDeclined(changed_sentence(block))
    return out


def _changed(attributes: Attributes) -> bool:
    """Does one of them hold another object now."""
    return any(_names(owner) != _names(before) or any(owner[name] is not before[name] for name in _names(before))
               for owner, before in attributes)


def put_back(attributes: Attributes) -> None:
    """What they held, back in its place."""
    for owner, before in attributes:
        for name in _names(owner) - before.keys():
            del owner[name]
        owner.update({name: before[name] for name in _names(before)})


def _names(owner: dict[str, Any]) -> set[str]:
    return {name for name in owner if name not in OURS}


def changed_sentence(module: nn.Module) -> str:
    return (f"{type(module).__name__} changes something that outlives its call (an attribute, a list), which the forward around it "
            "may read")


def facts(values: Any) -> tuple:
    """What a block's result may depend on, comparable between its calls."""
    return tuple(
        (value.dtype, value.device, str(value.shape), str(value.stride()), value.requires_grad)
        if isinstance(value, Tensor)
        else repr(value)
        for value in tree_leaves(values)
    )


def _imagined(block: nn.Module, mode: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """One run of a block's forward on fake tensors, of which nothing stays behind in its attributes."""
    attributes = attributes_of(block)
    weights = {f"block.{name}": mode.from_tensor(t, static_shapes=True) for name, t in _tensors(block)}
    try:
        with mode.shape_env.ignore_fresh_unbacked_symbols():
            result = torch.func.functional_call(_Bare(block), weights, args, kwargs)
        if _changed(attributes):
            raise StackDeclined(changed_sentence(block))
        return result
    except RuntimeError as error:  # it looks at values, which fake tensors have none of
        raise StackDeclined(f"what {type(block).__name__} gives cannot be told without running it") from error
    finally:
        put_back(attributes)


class _Bare(nn.Module):
    """A block's forward without its hooks, slots and instance attributes."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.block).forward(self.block, *args, **kwargs)


def _tensors(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from block.named_parameters()
    yield from block.named_buffers()


def _first_tensor(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    found = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if found is None:
        raise StackDeclined("a block is given no tensor")
    return found


def _is_trained(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Is a gradient wanted of anything that goes into a block's result."""
    given = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    return any(tensor.requires_grad for tensor in given) or any(p.requires_grad for p in block.parameters())


def _is_like(out: Any, given: Tensor) -> bool:
    """A tensor that lies as ``given`` does. (The stride of a dimension of one element is anything.)"""
    if not isinstance(out, Tensor) or (out.dtype, out.device, out.shape) != (given.dtype, given.device, given.shape):
        return False
    return all(size == 1 or a == b for size, a, b in zip(out.shape, out.stride(), given.stride(), strict=True))


def _holds_mutable(values: Iterable[Any]) -> bool:
    return any(isinstance(v, list | dict | set) or (isinstance(v, tuple) and _holds_mutable(v)) for v in values)


def _given(args: tuple, kwargs: dict[str, Any]) -> tuple:
    return facts(args), facts(sorted(kwargs.items()))


def _outline(out: Any) -> tuple:
    """What a block gave, but for the values of its tensors."""
    leaves, structure = tree_flatten(out)
    return structure, facts(leaves)


def _likeness(value: Any, requires_grad: bool = False) -> Any:
    if not isinstance(value, Tensor):
        return value
    like = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return like.requires_grad_() if value.requires_grad or requires_grad else like
