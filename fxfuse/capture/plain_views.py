"""What a tensor that lies in memory in order looks like in another shape, told in one step.

For sizes that are symbols torch folds and splits one dimension after the other, an operation on stand-ins each, and compares products
of sizes on the way: of tracing a decoder layer a tenth. Of a tensor without gaps every shape of as many elements is a view, with the
strides of that shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from typing import Any

import torch
from torch import SymInt, Tensor

from fxfuse._torch import refs, tensor_facts

_in_steps = refs._reshape_view_helper


@wraps(_in_steps)
def reshape_view(a: Tensor, *shape: Any, allow_copy: bool) -> Tensor:
    """``a`` in another shape: a view where it can be one, else, if allowed, a copy."""
    wanted = tensor_facts.extract_shape_from_varargs(shape, validate=False)
    if not (a.dim() and len(wanted) and _is_ordinary(wanted) and _is_ordinary(a.shape) and _is_in_order(a)):
        return _in_steps(a, *shape, allow_copy=allow_copy)
    sizes = tensor_facts.infer_size(wanted, a.numel())  # raises if there are not as many elements
    strides: list[Any] = [1]
    for size in reversed(sizes[1:]):
        strides.insert(0, strides[0] * size)
    return torch.as_strided(a, sizes, strides)


def _is_ordinary(sizes: Sequence[Any]) -> bool:
    """None is zero, nor of a tensor whose values decide it. (A size that stands for what Dynamo was given is at least two.)"""
    return all(size.node.has_hint() if isinstance(size, SymInt) else size != 0 for size in sizes)


def _is_in_order(a: Tensor) -> bool:
    last = a.stride(-1)
    return isinstance(last, int) and last == 1 and a.is_contiguous()


SETTINGS: tuple[tuple[Any, str, Any], ...] = ((refs, "_reshape_view_helper", reshape_view),)
