"""Readers of operations that the canonical graph keeps whole, with their arguments in one order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from .builder import Builder, Leave
from .facts import requires_grad, same_sizes
from .reductions import last
from .vocabulary import aten, spelling

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


@spelling("rms_norm")
def rms_norm(b: Builder, input: Node, normalized_shape: Sequence[Any], weight: Any = None, eps: float | None = None) -> Node:
    return b.finish(aten.rms_norm.default, input, list(normalized_shape), weight, eps)


@spelling("layer_norm")
def layer_norm(b: Builder, input: Node, normalized_shape: Sequence[Any], weight: Any = None, bias: Any = None,
               eps: float = 1e-5, cudnn_enable: bool = True) -> Node:  # fmt: skip
    return b.finish(aten.layer_norm.default, input, list(normalized_shape), weight, bias, eps)


def _read_softmax(name: str, target: Any) -> None:
    @spelling(name)
    def read(b: Builder, input: Node, dim: Any = None, *more: Any, dtype: Any = None, _stacklevel: int = 3) -> Node:
        last(b, input, dim)
        given = dtype if dtype is not None else next((m for m in more if isinstance(m, torch.dtype)), None)
        return b.finish(target, input, -1, given)


_read_softmax("softmax", aten.softmax.int)
_read_softmax("log_softmax", aten.log_softmax.int)


@spelling(functions=(F.cross_entropy,))
def cross_entropy(b: Builder, input: Node, target: Node, weight: Any = None, size_average: Any = None, ignore_index: int = -100,
                  reduce: Any = None, reduction: str = "mean", label_smoothing: float = 0.0) -> Node:  # fmt: skip
    if size_average is not None or reduce is not None or reduction not in _REDUCTIONS:
        raise Leave("a reduction spelled in a deprecated way")
    return cross_entropy_loss(b, input, target, weight, _REDUCTIONS[reduction], ignore_index, label_smoothing)


@spelling("cross_entropy_loss")
def cross_entropy_loss(b: Builder, input: Node, target: Node, weight: Any = None, reduction: int = 1,
                       ignore_index: int = -100, label_smoothing: float = 0.0) -> Node:  # fmt: skip
    return b.finish(aten.cross_entropy_loss.default, input, target, weight, reduction, ignore_index, label_smoothing)


@spelling(functions=(F.kl_div,))
def kl_div(b: Builder, input: Node, target: Node, size_average: Any = None, reduce: Any = None, reduction: str = "mean",
           log_target: bool = False) -> Node:  # fmt: skip
    """``t * (log t - x)``, for a target that is a logarithm ``exp(t) * (t - x)``, as torch writes them; then summed up."""
    shape = b.tensor(input).shape
    wide = {b.tensor(input).dtype, b.tensor(target).dtype} <= {torch.float32, torch.float64}
    if size_average is not None or reduce is not None or len(shape) < 2 or not wide or not same_sizes(shape, b.tensor(target).shape):
        raise Leave("not a divergence of float32 rows")
    if log_target:
        each = b.call(aten.mul.Tensor, b.call(aten.exp.default, target), b.call(aten.sub.Tensor, target, input))
    else:
        entropy = b.call(aten.mul.Tensor, target, b.call(aten.log.default, target))
        positive = b.call(aten.where.ScalarOther, b.call(aten.gt.Scalar, target, 0), entropy, 0.0)
        each = b.call(aten.sub.Tensor, positive, b.call(aten.mul.Tensor, target, input))
    if reduction == "none":
        return each
    total = b.call(aten.sum.default, b.call(aten.sum.dim_IntList, each, [-1], False))
    counted = {"sum": shape[:0], "batchmean": shape[:1], "mean": shape}.get(reduction)
    if counted is None or any(not isinstance(size, int) for size in counted[1:]) or requires_grad(target):
        raise Leave("a reduction over sizes that are not known")
    for size in counted:
        total = b.call(aten.div.Tensor, total, size if isinstance(size, int) else b.call(aten.sym_size.int, input, 0))
    return total
