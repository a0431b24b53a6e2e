"""Readers of views: every cut, turn and reshape of a tensor in one spelling each.

Dimensions count from the end (the last is -1), those of a permutation from the front. A view that changes nothing is dropped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import SymInt
from torch.fx import Node

from .builder import Builder, Leave
from .facts import same_size, same_sizes, same_strides, static_size, statically_one, tensor_of, value_of
from .vocabulary import aten, spelling

END = sys.maxsize


def flat(arguments: tuple[Any, ...]) -> list[Any]:
    """Sizes or dimensions given one by one or as one list."""
    if len(arguments) == 1 and isinstance(arguments[0], (tuple, list)):
        return list(arguments[0])
    return list(arguments)


def _sizes(b: Builder, input: Node, arguments: tuple[Any, ...]) -> list[Any]:
    sizes = flat(arguments)
    if len(sizes) == 1 and isinstance(sizes[0], Node) and sizes[0].target is torch.Size:
        sizes = list(sizes[0].args[0])
    if len(sizes) == 1 and isinstance(sizes[0], Node) and isinstance(value_of(sizes[0]), (tuple, list)):
        return b.sizes(b.expected().shape, input, *_measured(sizes[0]))
    if not sizes or any(tensor_of(s) is not None or isinstance(s, torch.dtype) for s in sizes):
        raise Leave("not a list of sizes")
    return sizes


def _measured(size: Node) -> list[Node]:
    """The tensors that a size was read off."""
    if tensor_of(size) is not None:
        return [size]
    return [tensor for operand in size.all_input_nodes for tensor in _measured(operand)]


# Sizes


@spelling("view", "reshape", "_unsafe_view", "_reshape_alias")
def reshape(b: Builder, input: Node, *shape: Any, size: Any = None) -> Node:
    if same_sizes(b.tensor(input).shape, b.expected().shape) and b.tensor(input).dtype == b.expected().dtype:
        return input
    return b.finish(aten.reshape.default, input, _sizes(b, input, shape if size is None else (size,)))


@spelling("flatten")
def flatten(b: Builder, input: Node, start_dim: Any = 0, end_dim: Any = -1) -> Node:
    return _to_expected_shape(b, input)


@spelling("unflatten")
def unflatten(b: Builder, input: Node, dim: Any, sizes: Any) -> Node:
    return _to_expected_shape(b, input)


@spelling("view_as", "reshape_as")
def view_as(b: Builder, input: Node, other: Node) -> Node:
    return _to_expected_shape(b, input, other)


def _to_expected_shape(b: Builder, input: Node, *others: Node) -> Node:
    expected = b.expected().shape
    return reshape(b, input, b.sizes(expected, input, *others))


@spelling("expand")
def expand(b: Builder, input: Node, *size: Any, implicit: bool = False) -> Node:
    if same_sizes(b.tensor(input).shape, b.expected().shape):
        return input
    return b.finish(aten.expand.default, input, _sizes(b, input, size))


@spelling("expand_as")
def expand_as(b: Builder, input: Node, other: Node) -> Node:
    return expand(b, input, b.sizes(b.expected().shape, input, other))


@spelling("broadcast_to")
def broadcast_to(b: Builder, input: Node, size: Any) -> Node:
    return expand(b, input, size)


@spelling("unsqueeze")
def unsqueeze(b: Builder, input: Node, dim: Any) -> Node:
    return b.finish(aten.unsqueeze.default, input, b.dim(input, dim, extra=1))


@spelling("squeeze")
def squeeze(b: Builder, input: Node, *dim: Any) -> Node:
    """Dimensions of size 1 among those named (all by default); one that is known not to be 1 stays."""
    shape = b.tensor(input).shape
    dims = {b.dim(input, d) for d in flat(dim)} if dim else {d - len(shape) for d in range(len(shape))}
    gone = sorted((d for d in dims if statically_one(shape[d])), reverse=True)
    if len(shape) - len(gone) != b.expected().dim():
        raise Leave("a size that may be 1")
    # From the last dimension on, each one that goes shifts those before it by one.
    return _sequence(b, input, [(aten.squeeze.dim, d + i) for i, d in enumerate(gone)])


def _sequence(b: Builder, x: Node, steps: Sequence[tuple[Any, ...]]) -> Node:
    """Apply view after view; the last one stands for the result."""
    for target, *arguments in steps[:-1]:
        x = b.call(target, x, *arguments)
    for target, *arguments in steps[-1:]:
        x = b.finish(target, x, *arguments)
    return x


# Turns


def _permuted(b: Builder, x: Node, dims: Sequence[int]) -> Node:
    rank = b.tensor(x).dim()
    dims = [d % rank for d in dims]
    return x if dims == list(range(rank)) else b.finish(aten.permute.default, x, dims)


@spelling("permute")
def permute(b: Builder, input: Node, *dims: Any) -> Node:
    return _permuted(b, input, [b.dim(input, d) for d in flat(dims)])


@spelling("transpose", "swapaxes", "swapdims")
def transpose(b: Builder, input: Node, dim0: Any, dim1: Any) -> Node:
    order = list(range(b.tensor(input).dim()))
    i, j = b.dim(input, dim0), b.dim(input, dim1)
    order[i], order[j] = order[j], order[i]
    return _permuted(b, input, order)


@spelling("movedim", "moveaxis")
def movedim(b: Builder, input: Node, source: Any, destination: Any) -> Node:
    rank = b.tensor(input).dim()
    pairs = sorted(zip(
        [b.dim(input, d) % rank for d in flat((destination,))],
        [b.dim(input, d) % rank for d in flat((source,))],
        strict=True,
    ))  # fmt: skip
    order = [d for d in range(rank) if d not in {s for _, s in pairs}]
    for to, origin in pairs:
        order.insert(to, origin)
    return _permuted(b, input, order)


@spelling("t", "adjoint")
def t(b: Builder, input: Node) -> Node:
    return input if b.tensor(input).dim() < 2 else transpose(b, input, -2, -1)


@spelling(functions=(getattr,))
def attribute(b: Builder, input: Node, name: str) -> Node:
    """``x.T`` of a matrix, ``x.mT`` of several."""
    rank = b.tensor(input).dim()
    if not (name == "mT" or (name == "T" and rank == 2)) or rank < 2:
        raise Leave("not a transposed matrix")
    return transpose(b, input, -2, -1)


# Cuts


def cut(b: Builder, x: Node, dim: int, start: Any, end: Any, step: int = 1) -> tuple[Any, ...] | None:
    """The slice ``x[start:end:step]`` along a dimension as a step of a sequence, or None where it takes everything."""
    size = b.tensor(x).shape[dim]
    start, end = _bound(start, size, 0), _bound(end, size, END)
    if isinstance(start, int) and start == 0 and step == 1 and _covers(end, size):
        return None
    if isinstance(end, int) and isinstance(size, int):
        end = min(end, size)
    return aten.slice.Tensor, dim, start, end, step


def _bound(bound: Any, size: Any, default: int) -> Any:
    """A bound as a number from the front, where the size is one."""
    if bound is None:
        return default
    if isinstance(bound, int) and bound < 0 and isinstance(size, int):
        return max(0, bound + size)
    return bound


def _covers(end: Any, size: Any) -> bool:
    known = value_of(end) if isinstance(end, Node) else end
    if isinstance(known, int) and isinstance(size, int):
        return known >= size
    return known == END or (isinstance(known, (int, SymInt)) and same_size(known, size))


def _slice(b: Builder, x: Node, dim: int, start: Any, end: Any, step: int = 1) -> Node:
    step_taken = cut(b, x, dim, start, end, step)
    return x if step_taken is None else _sequence(b, x, [step_taken])


@spelling("slice", search=False)
def slice_(b: Builder, input: Node, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Node:
    return _slice(b, input, b.dim(input, dim), start, end, step)


@spelling("narrow")
def narrow(b: Builder, input: Node, dim: Any, start: Any, length: Any) -> Node:
    if not isinstance(start, int) or not isinstance(length, int) or start < 0:
        raise Leave("bounds that are not constants")
    return _slice(b, input, b.dim(input, dim), start, start + length)


@spelling("chunk", "unsafe_chunk")
def chunk(b: Builder, input: Node, chunks: Any, dim: Any = 0) -> list[Node]:
    at = b.dim(input, dim)
    return split(b, input, -(-_static(b, input, at) // chunks), at)


@spelling("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes")
def split(b: Builder, tensor: Node, split_size_or_sections: Any, dim: Any = 0) -> list[Node]:
    at = b.dim(tensor, dim)
    sizes = split_size_or_sections
    if isinstance(sizes, int):
        total = _static(b, tensor, at)
        sizes = [min(sizes, total - start) for start in range(0, total, sizes)]
    if not all(isinstance(size, int) for size in sizes):
        raise Leave("sizes that are not constants")
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [_part(b, tensor, at, start, start + size) for start, size in zip(starts, sizes, strict=True)]


@spelling("unbind")
def unbind(b: Builder, input: Node, dim: Any = 0) -> list[Node]:
    at = b.dim(input, dim)
    return [b.call(aten.select.int, input, at, i) for i in range(_static(b, input, at))]


def _part(b: Builder, x: Node, dim: int, start: int, end: int) -> Node:
    taken = cut(b, x, dim, start, end)
    return x if taken is None else b.call(taken[0], x, *taken[1:])


def _static(b: Builder, x: Node, dim: int) -> int:
    size = static_size(b.tensor(x).shape[dim])
    if size is None:
        raise Leave("a size that is not known")
    return size


@spelling("select")
def select(b: Builder, input: Node, dim: Any, index: Any) -> Node:
    if not isinstance(index, int):
        raise Leave("an index that is not a constant")
    return b.finish(aten.select.int, input, b.dim(input, dim), index)


@spelling("getitem", "__getitem__")
def getitem(b: Builder, input: Node, index: Any) -> Node:
    """Basic indexing, one view for each dimension that it changes; what is left out of ``index`` stays whole."""
    steps = index_steps(b, input, index)
    return input if not steps else _sequence(b, input, steps)


def _is_basic(part: Any) -> bool:
    if isinstance(part, slice):
        return all(not isinstance(p, Node) or isinstance(value_of(p), (int, SymInt)) for p in (part.start, part.stop)) and (
            part.step is None or isinstance(part.step, int)
        )
    return part is None or part is Ellipsis or (isinstance(part, int) and not isinstance(part, bool))


def index_steps(b: Builder, x: Node, index: Any) -> list[tuple[Any, ...]]:
    """The views (target, arguments after the tensor) that ``x[index]`` takes, from the last dimension to the first: a view
    then never moves a dimension that a later one speaks of, since those are counted from the end."""
    rank = b.tensor(x).dim()
    index = index if isinstance(index, tuple) else (index,)
    if not all(_is_basic(part) for part in index):
        raise Leave("indexed by a tensor")
    parts = _without_ellipsis(index, rank)
    steps: list[tuple[Any, ...]] = []
    remaining = rank
    added = 0
    for part in reversed(parts):
        if part is None:
            added += 1
            steps.append((aten.unsqueeze.default, -added))
            continue
        dim = remaining - rank - 1
        remaining -= 1
        if isinstance(part, slice):
            taken = cut(b, x, dim, part.start, part.stop, part.step or 1)
            added += 1
            if taken is not None:
                steps.append((taken[0], -added, *taken[2:]))
        else:
            steps.append((aten.select.int, -added - 1, part))
    return steps


def _without_ellipsis(index: tuple[Any, ...], rank: int) -> list[Any]:
    """One part for each dimension (``None``s besides)."""
    missing = rank - sum(part is not None and part is not Ellipsis for part in index)
    if missing < 0 or sum(part is Ellipsis for part in index) > 1:
        raise Leave("too many indices")
    whole = [slice(None)] * missing
    if not any(part is Ellipsis for part in index):
        return [*index, *whole]
    at = next(i for i, part in enumerate(index) if part is Ellipsis)
    return [*index[:at], *whole, *index[at + 1 :]]


# Assemblies


@spelling("cat", "concat", "concatenate")
def cat(b: Builder, tensors: Any = None, dim: Any = 0, axis: Any = None) -> Node:
    """Pieces of size 0 are left out; one piece alone is itself."""
    if not isinstance(tensors, (tuple, list)) or any(tensor_of(x) is None for x in tensors):
        raise Leave("not a list of tensors")
    expected = b.expected()
    at = b.dim(b.node, dim if axis is None else axis)
    if any(b.tensor(x).dim() != expected.dim() for x in tensors):
        raise Leave("pieces of another rank")
    pieces = [x for x in tensors if not same_size(b.tensor(x).shape[at], 0)]
    if len(pieces) == 1 and b.tensor(pieces[0]).dtype == expected.dtype:
        return b.finish(aten.clone.default, pieces[0], memory_format=torch.contiguous_format)
    return b.finish(aten.cat.default, list(pieces), at)


@spelling("stack")
def stack(b: Builder, tensors: Any, dim: Any = 0) -> Node:
    if not isinstance(tensors, (tuple, list)) or any(tensor_of(x) is None for x in tensors):
        raise Leave("not a list of tensors")
    return b.finish(aten.stack.default, list(tensors), b.dim(tensors[0], dim, extra=1))


@spelling("repeat_interleave")
def repeat_interleave(b: Builder, input: Node, repeats: Any, dim: Any = None, output_size: Any = None) -> Node:
    if not isinstance(repeats, int) or dim is None:
        raise Leave("repeats that are not one constant along one dimension")
    return b.finish(aten.repeat_interleave.self_int, input, repeats, b.dim(input, dim))


# Copies


@spelling("contiguous")
def contiguous(b: Builder, input: Node, memory_format: torch.memory_format = torch.contiguous_format) -> Node:
    """Nothing where the tensor already lies so; a copy where it does not."""
    if same_strides(b.tensor(input), b.expected()):
        return input
    return b.finish(aten.clone.default, input, memory_format=memory_format)


@spelling("clone")
def clone(b: Builder, input: Node, memory_format: torch.memory_format = torch.preserve_format) -> Node:
    return b.finish(aten.clone.default, input, memory_format=memory_format)
