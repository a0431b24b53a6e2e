"""Readers of reductions over the last dimension; others are left as they were."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from .builder import Builder, Leave
from .facts import requires_grad, same_sizes
from .pointwise import real
from .views import flat
from .vocabulary import ARITHMETIC, aten, spelling


def last(b: Builder, x: Node, dim: Any) -> list[int]:
    """[-1], when that is what ``dim`` says."""
    dims = [b.dim(x, d) for d in flat((dim,))]
    if dims != [-1] or not real(b, x):
        raise Leave("not over the last dimension alone")
    return dims


@spelling("sum", search=False, functions=(torch.sum,))
def sum(b: Builder, input: Node, dim: Any = None, keepdim: bool = False, dtype: Any = None, axis: Any = None) -> Node:
    return _accumulated(b, aten.sum.dim_IntList, input, dim if axis is None else axis, keepdim, dtype)


@spelling("mean", search=False, functions=(torch.mean,))
def mean(b: Builder, input: Node, dim: Any = None, keepdim: bool = False, dtype: Any = None, axis: Any = None) -> Node:
    return _accumulated(b, aten.mean.dim, input, dim if axis is None else axis, keepdim, dtype)


def _accumulated(b: Builder, target: Any, input: Node, dim: Any, keepdim: bool, dtype: Any) -> Node:
    dims = last(b, input, dim)
    return b.finish(target, input if dtype is None else b.cast(input, dtype), dims, keepdim)


@spelling("amax", search=False, functions=(torch.amax,))
def amax(b: Builder, input: Node, dim: Any = (), keepdim: bool = False) -> Node:
    return b.finish(aten.amax.default, input, last(b, input, dim), keepdim)


@spelling("logsumexp")
def logsumexp(b: Builder, input: Node, dim: Any, keepdim: bool = False) -> Node:
    return b.finish(aten.logsumexp.default, input, last(b, input, dim), keepdim)


@spelling("max", search=False, functions=(torch.max,))
def max(b: Builder, input: Node, dim: Any = None, keepdim: bool = False, other: Any = None) -> Any:
    """The greater of two tensors, or the greatest of a row where nobody asks for its place or its gradient.

    (``amax`` shares a gradient among equal values, ``max`` gives it to the first.)
    """
    if isinstance(dim, Node) or other is not None:
        return b.finish(aten.maximum.default, input, dim if other is None else other)
    dims = last(b, input, dim)
    place_read = any(u.target is not operator.getitem or (u.args[1] != 0 and u.users) for u in b.node.users)
    if requires_grad(input) or place_read:
        raise Leave("the place of the maximum is asked for")
    return [b.call(aten.amax.default, input, dims, keepdim), None]


@spelling("min", search=False, functions=(torch.min,))
def min(b: Builder, input: Node, other: Any = None) -> Node:
    if not isinstance(other, Node):
        raise Leave("a minimum over a dimension")
    return b.finish(aten.minimum.default, input, other)


@spelling("var", search=False, functions=(torch.var,))
def var(b: Builder, input: Node, dim: Any = None, unbiased: Any = True, keepdim: bool = False, correction: Any = None) -> Node:
    correction = int(unbiased) if correction is None else correction
    if correction not in (0, 1):
        raise Leave("a correction other than 0 or 1")
    return b.finish(aten.var.dim, input, last(b, input, dim), bool(correction), keepdim)


@spelling("norm", search=False, functions=(torch.norm, torch.linalg.norm))
def norm(b: Builder, input: Node, p: Any = None, dim: Any = None, keepdim: bool = False, dtype: Any = None,
         ord: Any = None) -> Node:  # fmt: skip
    """The Euclidean length of each row, one rounding from the sum of squares."""
    order = p if ord is None else ord
    if order not in (None, "fro", 2) or not isinstance(dim, (int, tuple, list)):
        raise Leave("not the Euclidean norm of rows")
    return vector_norm(b, input, 2, dim, keepdim, dtype)


@spelling("linalg_vector_norm", search=False, functions=(torch.linalg.vector_norm,))
def vector_norm(b: Builder, x: Node, ord: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Node:
    if ord != 2:
        raise Leave("not the Euclidean norm")
    return b.finish(aten.linalg_vector_norm.default, x if dtype is None else b.cast(x, dtype), 2, last(b, x, dim), keepdim)


@spelling("gather", search=False, functions=(torch.gather,))
def gather(b: Builder, input: Node, dim: Any, index: Node, sparse_grad: bool = False) -> Node:
    """One element of each row."""
    x, at = b.tensor(input), b.tensor(index)
    one_each = at.dim() == x.dim() and same_sizes(at.shape, (*x.shape[:-1], 1))
    if sparse_grad or not one_each:
        raise Leave("not one element of each row")
    return b.finish(aten.gather.default, input, *last(b, input, dim), index)


@spelling("normalize", search=False, functions=(F.normalize,))
def normalize(b: Builder, input: Node, p: float = 2.0, dim: int = 1, eps: float = 1e-12) -> Node:
    """``x / max(|x|, eps)`` as torch writes it."""
    if p != 2 or b.tensor(input).dtype != b.expected().dtype:
        raise Leave("not the Euclidean norm")
    length = b.call(aten.linalg_vector_norm.default, input, 2, last(b, input, dim), True)
    length = b.call(aten.clamp.default, length, eps, None)
    return b.finish(ARITHMETIC["div"], input, length)
