"""SDPA at one place of a graph: its own kernel, or the library's once the layout of its operands takes that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ..attention.flex import BACKWARD, FORWARD
from . import layouts, library
from .families import BACKWARDS, FORWARDS, Family, arguments, is_plain

DTYPES = library.DTYPES


def place_attention(graph: fx.Graph) -> int:
    """On a graph that nothing looks into any more: calls of SDPA that a library may take. Returns how many."""
    count = 0
    for node in graph.nodes if layouts.is_possible() else ():
        families = FORWARDS if node.target in FORWARDS else BACKWARDS if node.target in BACKWARDS else None
        if families is None or not is_plain(node):
            continue
        asked = arguments(node)
        query, family, causal, scale = asked["query"].meta.get("val"), families[node.target], asked["is_causal"], asked["scale"]
        if not isinstance(query, torch.Tensor) or query.dtype not in DTYPES:
            continue
        if families is FORWARDS:
            sums = node.meta["val"][1]  # (None where no backward follows, in some releases)
            dims = sums.dim() if isinstance(sums, torch.Tensor) else 0
            node.target = _named(_forward(family, node.target, causal, scale, dims), "attention")
        else:
            node.target = _named(_backward(family, node.target, causal, scale), "attention_backward")
        count += 1
    return count


def _forward(family: Family, operator: Any, causal: bool, scale: float | None, dims: int) -> Callable[..., Any]:
    """``dims``: of the tensor of the rows' sums."""

    def attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Any:
        if not layouts.takes(FORWARD, family, query, key, value, causal, scale):
            return operator(query, key, value, *rest, **named)
        out, sums = library.forward(query, key, value, causal, scale)
        return out, sums.unsqueeze(-1) if dims > sums.dim() else sums, *family.rest(query, key)

    return attention


def _backward(family: Family, operator: Any, causal: bool, scale: float | None) -> Callable[..., Any]:
    def attention_backward(arriving: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor,
                           *rest: Any, **named: Any) -> Any:  # fmt: skip
        if not layouts.takes(BACKWARD, family, query, key, value, causal, scale) or arriving.stride(3) != 1:
            return operator(arriving, query, key, value, out, sums, *rest, **named)
        return library.backward(arriving, query, key, value, out, sums, causal, scale)

    return attention_backward


def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Generated code names a function by these."""
    function.__name__ = function.__qualname__ = name
    function.__module__ = "fxfuse"
    return function
