"""Readers of operations that the canonical graph keeps whole, with their arguments in one order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from .builder import Builder, Leave
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
