"""What can be asked of a tensor without reading its values, and what only says how its values are to be had."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_PROPERTIES = (
    "shape", "dtype", "device", "requires_grad", "ndim", "layout", "is_leaf", "grad", "grad_fn", "output_nr", "itemsize",
    "nbytes", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested", "is_mkldnn", "is_xpu", "is_mps",
    "names", "name", "_version", "_base",
)
_METHODS = (
    "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "is_contiguous", "element_size",
    "get_device", "is_floating_point", "is_complex", "is_signed", "is_conj", "is_neg", "is_inference", "has_names",
    "is_same_size", "is_pinned", "__len__", "__hash__",
)
_FUNCTIONS = ("numel", "is_floating_point", "is_complex", "is_signed", "is_conj", "is_neg", "is_same_size", "is_inference",
              "result_type")

# Shapes, types and places.
QUERIES = frozenset(
    [getattr(Tensor, name).__get__ for name in _PROPERTIES if hasattr(Tensor, name)]
    + [getattr(Tensor, name) for name in _METHODS if hasattr(Tensor, name)]
    + [getattr(torch, name) for name in _FUNCTIONS if hasattr(torch, name)]
)

TYPE_NAME = Tensor.type  # a query when called without arguments

# What prints a tensor: it must not raise in a debugger.
PRINTS = frozenset([Tensor.__repr__, Tensor.__format__, Tensor.__str__])

# What waits for the gradient of the loss with respect to the logits: there is none, the loss does not pass through them.
AWAITS_GRADIENT = frozenset([Tensor.retain_grad, Tensor.register_hook, Tensor.register_post_accumulate_grad_hook])

DETACHES = frozenset([Tensor.detach, torch.detach, Tensor.data.__get__])
COPIES = frozenset([Tensor.clone, torch.clone])
NOTHING_TO_DO = frozenset([Tensor.contiguous])
_NAMED_CASTS: dict[Any, torch.dtype] = {
    Tensor.float: torch.float32, Tensor.double: torch.float64, Tensor.half: torch.float16, Tensor.bfloat16: torch.bfloat16,
}


def cast_to(func: Any, args: tuple, kwargs: dict[str, Any]) -> torch.dtype | None:
    """The dtype that this call converts a tensor to, if that is all it does. ``args`` begins with the tensor."""
    tensor, *rest = args
    if func in _NAMED_CASTS:
        return None if rest or kwargs else _NAMED_CASTS[func]
    if func is Tensor.type:
        return rest[0] if len(rest) == 1 and isinstance(rest[0], torch.dtype) and not kwargs else None
    if func is not Tensor.to or not kwargs.keys() <= {"dtype", "device", "non_blocking"}:
        return None
    dtype, device, flags = kwargs.get("dtype"), kwargs.get("device"), 0
    for value in rest:
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, Tensor):
            dtype, device = value.dtype, value.device
        elif isinstance(value, bool):
            flags += 1
        else:
            device = value
    if flags > 1 or (device is not None and torch.device(device) != tensor.device):  # a copy is wanted, or another place
        return None
    return tensor.dtype if dtype is None else dtype
