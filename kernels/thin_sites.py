"""Thin products at one place of a graph: what was found out at the first call is looked up by a few numbers at the next ones.

A place's widths and dtypes never change. What may change is in the key: the number of rows, strides, alignment, the device. On a hit
the kernels are launched on addresses; nothing is sliced or checked.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxfuse.kernels import room, thin_choice
from fxfuse.kernels.invoke import INTERPRETED, Kernel, current_device, current_stream
from fxfuse.products.calls import accumulate, one_product, two_products

KEPT = 256  # numbers of rows that a place remembers


def pair_site() -> Callable[..., tuple[Tensor, Tensor]]:
    """A function that computes what ``products.calls.thin_pair`` does, for one place."""
    site = partial(_pair, {})
    return _named(lambda *arguments: site(*arguments), "thin_pair")


def product_site() -> Callable[..., Tensor]:
    """The same for ``products.calls.product`` over a short contraction."""
    site = partial(_product, {})
    return _named(lambda *arguments: site(*arguments), "thin_product")


def added_product_site() -> Callable[..., Tensor]:
    """``base + alpha * left @ right`` over a short contraction, in new memory."""
    site = partial(_product, {})
    return _named(lambda base, left, right, alpha: site(left, right, alpha, base), "thin_sum")


def accumulating_site() -> Callable[..., Tensor]:
    """``buffer += alpha * left @ right`` over a short contraction; the sum is what is returned. Its kernel is the one that
    ``added_product_site`` has for these sizes, so that a forward whose stream dies here has the bits of one that keeps it."""
    site = partial(_accumulated, {})
    return _named(lambda *arguments: site(*arguments), "thin_accumulate")


def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Generated code names a function by these."""
    function.__name__ = function.__qualname__ = name
    function.__module__ = "fxfuse"
    return function


def _pair(ready: dict[tuple, Any], buffer: Tensor | None, start: int, width: int, matrix: Tensor, right: Tensor, left: Tensor,
          alpha: float, beta: float, wide: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows, rank = matrix.size(0), right.size(1)
    if buffer is None:
        buffer = matrix.new_empty((rows, width))
    down = matrix.new_empty((matrix.size(1), rank), dtype=torch.float32 if wide else None)
    places = (matrix.data_ptr(), right.data_ptr(), left.data_ptr(), buffer.data_ptr() + start * matrix.itemsize, down.data_ptr())
    device = matrix.get_device()
    low = (places[0] | places[1] | places[2] | places[3] | places[4]) & 15
    key = (rows, matrix.stride(), right.stride(), left.stride(), buffer.stride(0), low, device)
    found = ready.get(key)
    if found is not None and not INTERPRETED:
        parts = torch.empty(found.length, dtype=torch.float32, device=matrix.device)
        first = parts.data_ptr()
        second = first + found.offset
        launch_at(found.partial, (*places[:3], first, second), found.plan.instances, device)
        launch_at(found.total, (first, second, *places[3:]), found.sums, device)
        return buffer, down
    tensors = (matrix, right, left, buffer[:, start : start + rank], down)
    if key not in ready:
        _remember(ready, key, low, thin_choice.pair(*tensors, alpha, beta))
    elif found is None:
        two_products(*tensors, alpha, beta)
    else:
        found(*tensors)  # the interpreter takes no addresses
    return buffer, down


def _product(ready: dict[tuple, Any], left: Tensor, right: Tensor, alpha: float, base: Tensor | None = None) -> Tensor:
    rows = left.size(0)
    out = left.new_empty((rows, right.size(1)))
    places = (left.data_ptr(), right.data_ptr(), (out if base is None else base).data_ptr(), out.data_ptr())
    device = left.get_device()
    low = (places[0] | places[1] | places[2] | places[3]) & 15
    key = (rows, left.stride(), right.stride(), None if base is None else base.stride(), low, device)
    found = ready.get(key)
    if found is not None and not INTERPRETED:
        launch_at(found.kernel, places, found.instances, device)
    elif key not in ready:
        _remember(ready, key, low, thin_choice.outer(left, right, out, alpha, base))
    elif found is None:
        one_product(left, right, out, alpha, base)
    else:
        found(left, right, out if base is None else base, out)
    return out


def _accumulated(ready: dict[tuple, Any], buffer: Tensor, left: Tensor, right: Tensor, alpha: float) -> Tensor:
    if buffer.stride(0) != buffer.size(1):
        return accumulate(buffer, left, right, alpha)  # rows with something beside them
    places = (left.data_ptr(), right.data_ptr(), buffer.data_ptr(), buffer.data_ptr())
    device = left.get_device()
    low = (places[0] | places[1] | places[2]) & 15
    key = (buffer.size(0), left.stride(), right.stride(), low, device)
    found = ready.get(key)
    if found is not None and not INTERPRETED:
        launch_at(found.kernel, places, found.instances, device)
    elif key not in ready:
        apart = room.another(buffer)  # what is timed runs many times, and must not add as often
        if apart is None:
            return accumulate(buffer, left, right, alpha)
        _remember(ready, key, low, thin_choice.outer(left, right, apart, alpha, buffer))
        return apart
    elif found is None:
        accumulate(buffer, left, right, alpha)
    else:
        found(left, right, buffer, buffer)
    return buffer


def _remember(ready: dict[tuple, Any], key: tuple, low: int, launch: Any) -> None:
    """Unaligned tensors are not remembered as such: which of them is unaligned is not in the key."""
    if len(ready) >= KEPT:
        ready.clear()
    if launch is None or not low:
        ready[key] = launch


def launch_at(kernel: Kernel, places: tuple[int, ...], instances: int, device: int) -> None:
    """Launches a kernel that was launched before, on the current stream of a device, with addresses for tensors."""
    if current_device() != device:
        with torch.cuda.device(device):
            return launch_at(kernel, places, instances, device)
    compiled = kernel.compiled
    compiled.run(instances, 1, 1, current_stream(device), compiled.function, compiled.packed_metadata, None, None, None,
                 *places, *kernel.numbers)
