"""The kernels of a graph (bufferized, or a head alone) begin to be compiled as soon as its launches are known, long before they run.

What a launch needs follows from the example inputs: shapes, strides and dtypes of its operands, known from the trace. A guess that
turns out wrong (other lengths are of another kind, a tensor is not aligned) costs the compiling alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ._torch import disable_current_modes
from .canonical.facts import tensor_of
from .products import calls

logger = logging.getLogger("fxfuse")


def compile_launches_ahead(graph: fx.Graph) -> int:
    """Have the kernels of a graph's launches compiled by other processes; returns how many launches were announced."""
    count = 0
    with disable_current_modes():
        for node in graph.nodes:
            compile_ahead = getattr(node.target, "compile_ahead", None) or _of_thin_products(node) or _of_loss(node)
            device = _device_of(node)
            if compile_ahead is None or device is None or device.type != "cuda":
                continue
            try:
                compile_ahead(device, *fx.map_arg(node.args, _form), **node.kwargs)
                count += 1
            except _Unknown as reason:
                logger.debug("%s is not compiled ahead: %s", node.name, reason)
            except Exception as error:  # only time is lost: it is compiled when it runs, and what is wrong is told then
                logger.info("%s is not compiled ahead: %s: %s", node.name, type(error).__name__, error)
    return count


def _of_thin_products(node: fx.Node) -> Callable[..., None] | None:
    """Of what products/ arranged; places that remember what was chosen for them are called alike."""
    if node.op != "call_function" or getattr(node.target, "__module__", "") not in ("fxfuse", calls.__name__):
        return None
    name = node.target.__name__  # type: ignore[union-attr]
    if name not in ("thin_pair", "thin_product", "product", "thin_sum", "thin_accumulate"):
        return None
    from .kernels import thin_ahead

    sums = dict.fromkeys(("thin_sum", "thin_accumulate"), thin_ahead.added_product)
    return {"thin_pair": thin_ahead.pair, **sums}.get(name, thin_ahead.product)


def _of_loss(node: fx.Node) -> Callable[..., None] | None:
    if node.target is not torch.ops.fxfuse.linear_loss.default:
        return None
    from .linear_loss.ahead import compile_ahead

    return compile_ahead


class _Unknown(Exception):
    """A size that only the data tells."""


def _form(node: fx.Node) -> Tensor | None:
    """A tensor on the meta device of the sizes that the example has."""
    value = tensor_of(node)
    if value is None:
        raise _Unknown(f"{node.name} has no known form")
    sizes, strides = ([_number(n) for n in numbers] for numbers in (value.shape, value.stride()))
    return torch.empty_strided(sizes, strides, dtype=value.dtype, device="meta")


def _number(size: Any) -> int:
    number = size if isinstance(size, int) else size.node.hint
    if number is None:
        raise _Unknown("a size depends on data")
    return number


def _device_of(node: fx.Node) -> torch.device | None:
    values = map(tensor_of, node.all_input_nodes)
    return next((value.device for value in values if value is not None), None)
