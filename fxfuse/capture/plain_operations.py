"""What the plainest operations make of stand-ins, told directly: casts, copies, arithmetic of floats element by element, views.

torch finds it out by decomposing each into operations of its own, each asked of its cache, and by sorting strides with comparisons of
symbols: a millisecond or more for what is as its operand is. Told here are the cases that take no thought, for every value of the
sizes: tensors of floats on one device, the first of them in the shape of the result and dense, in the order of its dimensions or of
another permutation of them; or all of them in order, one in the shape of the result. Everything else is torch's, errors too.

Where a tracer records what is done with sizes (AOTAutograd's passes do) torch goes its own way.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from fxfuse._torch import (
    FakeTensor,
    FakeTensorMode,
    dispatch_mode,
    in_kernel_invocation,
    mode_keys,
    pre_dispatch_modes,
)

aten = torch.ops.aten
_of_torch = FakeTensorMode._dispatch_impl
_BOUNDS = "_fxfuse_bounds"
_COPY = frozenset(["dtype", "device", "layout", "pin_memory", "non_blocking", "memory_format"])
Sizes = Sequence[Any]


@wraps(_of_torch)
def dispatched(self: Any, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """What ``func`` makes of its operands; torch's word where it takes thought."""
    tell = _TOLD.get(func)
    result = None if tell is None or not _is_ours(self) else tell(self, args, kwargs)
    return _of_torch(self, func, types, args, kwargs) if result is None else result


def _is_ours(mode: Any) -> bool:
    """No size depends on data, no values go along, and nothing records what is done with sizes."""
    env = mode.shape_env
    if env is None or env.unbacked_symint_counter or mode.propagate_real_tensors:
        return False
    return dispatch_mode(mode_keys.PROXY) is None and pre_dispatch_modes().get(0) is None


def _is_plain(mode: Any, value: Any) -> bool:
    return (type(value) is FakeTensor and value.fake_mode is mode and value.constant is None and value.layout is torch.strided
            and not value.is_conj() and not value.is_neg())  # fmt: skip


def _of_one(mode: Any, args: tuple, kwargs: Any) -> Any:
    """A function of each float: neg, silu, pow with a number."""
    x = args[0]
    if kwargs or not all(type(other) in (int, float) for other in args[1:]) or not _is_plain(mode, x) or not x.is_floating_point():
        return None
    strides = _strides_like(mode, x)
    return None if strides is None else _new(mode, x, x.shape, strides, x.dtype)


def _of_two(mode: Any, args: tuple, kwargs: Any) -> Any:
    """Arithmetic of two tensors of floats, or of one and a number."""
    if len(args) != 2 or (kwargs and not (len(kwargs) == 1 and type(kwargs.get("alpha")) in (int, float))):
        return None
    x, y = args
    if type(y) in (int, float):
        return _of_one(mode, (x,), {})
    if not all(_is_plain(mode, part) and part.dim() and part.is_floating_point() for part in args) or x.fake_device != y.fake_device:
        return None
    dtype = x.dtype if x.dtype == y.dtype else torch.promote_types(x.dtype, y.dtype)
    if _spreads_to(y.shape, x.shape):
        strides = _strides_like(mode, x)
        return None if strides is None else _new(mode, x, x.shape, strides, dtype)
    if _spreads_to(x.shape, y.shape) and _is_in_order(mode, x) and _is_in_order(mode, y):
        return _new(mode, y, y.shape, y.stride(), dtype)
    return None


def _copied(mode: Any, args: tuple, kwargs: Any) -> Any:
    """A cast or a copy."""
    x = args[0]
    if len(args) != 1 or not _is_plain(mode, x) or not _COPY.issuperset(kwargs) or kwargs.get("pin_memory") \
            or kwargs.get("layout") not in (None, torch.strided) or kwargs.get("device") not in (None, x.fake_device):
        return None
    dtype = kwargs.get("dtype") or x.dtype
    match kwargs.get("memory_format"):
        case None | torch.preserve_format:
            strides = _strides_like(mode, x)
        case torch.contiguous_format if all(_is_at_least(mode, size, 1) for size in x.shape):
            strides = _in_order(x.shape)[1:]
        case _:
            strides = None
    return None if strides is None else _new(mode, x, x.shape, strides, dtype)


def _viewed(mode: Any, args: tuple, kwargs: Any) -> Any:
    """A tensor in order in another shape."""
    x, wanted = args
    if kwargs or not _is_plain(mode, x) or not x.dim() or not len(wanted) or not _is_in_order(mode, x):
        return None
    sizes = _filled_in(x.shape, wanted)
    if sizes is None or not all(_is_at_least(mode, size, 1) for size in sizes):
        return None
    number, *strides = _in_order(sizes)
    if not _is_same(number, x.shape[0] * x.stride(0)):
        return None
    return _view(mode, x, sizes, strides, x.storage_offset())


def _filled_in(sizes: Sizes, wanted: Sizes) -> Sizes | None:
    """The sizes wanted, the one that is left open (-1) from those that there are: what is left of these without the others."""
    open_at = [at for at, size in enumerate(wanted) if type(size) is int and size == -1]
    if len(open_at) != 1:
        return None if open_at else wanted
    there, without = list(sizes), 1
    for size in (*wanted[: open_at[0]], *wanted[open_at[0] + 1:]):
        at = next((at for at, other in enumerate(there) if _is_same(size, other)), None)
        if at is not None:
            del there[at]
        elif type(size) is int:
            without *= size
        else:
            return None
    number = math.prod(size for size in map(_whole, there) if size is not None)
    if without < 1 or number % without:
        return None
    rest = math.prod((size for size in there if _whole(size) is None), start=number // without)
    return [*wanted[: open_at[0]], rest, *wanted[open_at[0] + 1:]]


def _averaged(mode: Any, args: tuple, kwargs: Any) -> Any:
    """The mean of each row of floats, the dimension kept."""
    x, dims, keep = (args[0], args[1], args[2]) if len(args) == 3 else (args[0], None, False)
    if kwargs or not _is_plain(mode, x) or not x.is_floating_point() or not keep or list(dims or ()) not in ([-1], [x.dim() - 1]) \
            or not _is_in_order(mode, x):  # fmt: skip
        return None
    sizes = [*x.shape[:-1], 1]
    return _new(mode, x, sizes, _in_order(sizes)[1:], x.dtype)


def _of_rows(mode: Any, args: tuple, kwargs: Any) -> Any:
    """A softmax or its logarithm, in the type of its operand."""
    x, _, widened = args
    if kwargs or widened or not _is_plain(mode, x) or not x.is_floating_point() or not x.dim() or not _is_in_order(mode, x):
        return None
    return _new(mode, x, x.shape, x.stride(), x.dtype)


def _cut(mode: Any, args: tuple, kwargs: Any) -> Any:
    """A part of a dimension whose size is a number, or all of any dimension."""
    defaults: tuple[Any, ...] = (None, 0, None, None, 1)
    x, dim, start, end, step = (*args, *defaults[len(args):])
    if kwargs or step != 1 or type(dim) is not int or not _is_plain(mode, x) or not -x.dim() <= dim < x.dim():
        return None
    size = _whole(x.shape[dim])
    if start in (None, 0) and type(end) in (int, type(None)) and (end is None or end == sys.maxsize):
        return _view(mode, x, x.shape, x.stride(), x.storage_offset())
    if size is None or not all(type(place) in (int, type(None)) for place in (start, end)):
        return None
    start, end, _ = slice(start, end).indices(size)
    sizes = list(x.shape)
    sizes[dim] = max(end - start, 0)
    return _view(mode, x, sizes, x.stride(), x.storage_offset() + min(start, size) * x.stride(dim))


def _widened(mode: Any, args: tuple, kwargs: Any) -> Any:
    """One more dimension, of size one."""
    x, dim = args
    if kwargs or not _is_plain(mode, x) or type(dim) is not int or not -x.dim() - 1 <= dim <= x.dim():
        return None
    at = dim % (x.dim() + 1)
    sizes, strides = list(x.shape), list(x.stride())
    strides.insert(at, sizes[at] * strides[at] if at < len(sizes) else 1)
    sizes.insert(at, 1)
    return _view(mode, x, sizes, strides, x.storage_offset())


def _turned(mode: Any, args: tuple, kwargs: Any) -> Any:
    """Two dimensions in each other's place."""
    x, *dims = args
    if kwargs or not _is_plain(mode, x):
        return None
    first, second = dims or (0, 1)
    if x.dim() < 2 or (not dims and x.dim() != 2) or not all(-x.dim() <= dim < x.dim() for dim in (first, second)):
        return None
    sizes, strides = list(x.shape), list(x.stride())
    for facts in (sizes, strides):
        facts[first], facts[second] = facts[second], facts[first]
    return _view(mode, x, sizes, strides, x.storage_offset())


def _new(mode: Any, like: Tensor, sizes: Sizes, strides: Sizes, dtype: torch.dtype) -> Tensor:
    """A new tensor on the device of ``like``."""
    with in_kernel_invocation(mode):
        elements = torch.empty_strided(sizes, strides, dtype=dtype, device="meta")
    return FakeTensor(mode, elements, like.fake_device)  # type: ignore[attr-defined]


def _view(mode: Any, base: Tensor, sizes: Sizes, strides: Sizes, offset: Any) -> Tensor:
    """A tensor in the memory of ``base``."""
    with in_kernel_invocation(mode), mode.shape_env.suppress_guards():
        view = torch.as_strided(base, sizes, strides, offset)
    return FakeTensor(mode, view, base.fake_device)  # type: ignore[attr-defined]


def _strides_like(mode: Any, x: Tensor) -> Sizes | None:
    """Those of a result whose dimensions lie in the order in which those of ``x`` do, without gaps. The order is plain where ``x``
    itself is in order, or where all sizes are two and more and each stride is as long as what lies within, or longer.
    """
    if _is_in_order(mode, x):
        return x.stride()
    sizes, strides = x.shape, x.stride()
    if not sizes or not all(_is_at_least(mode, size, 2) for size in sizes):
        return None
    packed: list[Any] = list(strides)
    least: Any = 1
    next_packed: Any = 1
    for dim in sorted(range(len(sizes)), key=lambda dim: _number(strides[dim])):
        stride = strides[dim]
        if not _is_same(stride, least) and ((_whole(stride) or 0) < (_whole(least) or sys.maxsize)):
            return None
        packed[dim] = next_packed
        least, next_packed = stride * sizes[dim], next_packed * sizes[dim]
    return packed


def _is_in_order(mode: Any, x: Tensor) -> bool:
    """Is this contiguous, each stride the product of the sizes behind it, whatever they are."""
    sizes = x.shape
    return all(map(_is_same, x.stride(), _in_order(sizes)[1:])) and all(_is_at_least(mode, size, 1) for size in sizes)


def _in_order(sizes: Sizes) -> list[Any]:
    """The number of elements, and the strides of a contiguous tensor."""
    found: list[Any] = [1]
    for size in reversed(sizes):
        found.insert(0, found[0] * size)
    return found


def _spreads_to(sizes: Sizes, wanted: Sizes) -> bool:
    """Does broadcasting make ``wanted`` of these sizes."""
    more = len(wanted) - len(sizes)
    return more >= 0 and all(_whole(size) == 1 or _is_same(size, other) for size, other in zip(sizes, wanted[more:], strict=True))


def _is_same(a: Any, b: Any) -> bool:
    """Are two sizes written alike."""
    return a is b or _written(a) == _written(b)


def _written(size: Any) -> Any:
    """A number, or an expression; a symbol that turned out to be a number is that number."""
    return size if type(size) is int else size.node.expr


def _whole(size: Any) -> int | None:
    """The number that a size is, whatever comes."""
    return size if type(size) is int else size.node.maybe_as_int()


def _is_at_least(mode: Any, size: Any, least: int) -> bool:
    """Is a size never smaller. What is known of a symbol only grows, so that what was so once stays so."""
    if type(size) is int:
        return size >= least
    expr = size.node.expr
    known = mode.shape_env.__dict__.setdefault(_BOUNDS, {})
    bound = known.get(expr)
    if bound is None:
        lower = mode.shape_env.bound_sympy(expr).lower
        bound = known[expr] = int(lower) if lower.is_Integer else 0
    return bound >= least


def _number(size: Any) -> int:
    return size if type(size) is int else int(size.node.hint)


_TOLD: dict[Any, Callable[[Any, tuple, Any], Any]] = {
    **dict.fromkeys([aten.neg.default, aten.silu.default, aten.sigmoid.default, aten.tanh.default, aten.relu.default, aten.exp.default,
                     aten.rsqrt.default, aten.sqrt.default, aten.cos.default, aten.sin.default, aten.pow.Tensor_Scalar], _of_one),
    **dict.fromkeys([aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor], _of_two),
    **dict.fromkeys([aten._to_copy.default, aten.clone.default], _copied),
    **dict.fromkeys([aten.view.default, aten._unsafe_view.default], _viewed),
    **dict.fromkeys([aten.transpose.int, aten.t.default], _turned),
    **dict.fromkeys([aten._softmax.default, aten._log_softmax.default], _of_rows),
    aten.mean.dim: _averaged,
    aten.slice.Tensor: _cut,
    aten.unsqueeze.default: _widened,
}  # fmt: skip

SETTINGS: tuple[tuple[Any, str, Any], ...] = ((FakeTensorMode, "_dispatch_impl", dispatched),)
