"""Reading products in a partitioned (ATen) graph, and small questions about its nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .calls import product
from .expression import THIN

aten = torch.ops.aten
WIDEST = 256  # columns of a thin matrix
RESHAPES = (aten.view.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class Term:
    """``alpha * left [M, K] @ right [K, N]``, computed by ``node``."""

    node: fx.Node
    left: fx.Node
    right: fx.Node
    alpha: float


def read_product(node: Any) -> Term | None:
    """A matmul of two matrices, or None."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    if node.target is aten.mm.default and len(node.args) == 2 and not node.kwargs:
        return Term(node, node.args[0], node.args[1], 1.0)  # type: ignore[arg-type]
    if node.target is product:
        return Term(node, *node.args)  # type: ignore[arg-type]
    return None


def tensor(node: fx.Node) -> Tensor:
    """What a node of a partitioned graph stands for."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        raise TypeError(f"{node} stands for no tensor")
    return value


def is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor)


def size(node: fx.Node, dim: int) -> int | None:
    """A size as a number, None where it varies."""
    found = tensor(node).shape[dim]
    return found if isinstance(found, int) else found.node.maybe_as_int()


def is_thin(columns: int | None, other: int | None) -> bool:
    """Is a matrix of so many columns thin beside one of ``other``. Keys and values of grouped attention are narrow, not thin: a
    matmul of theirs is worth its own launch, and their weights are too large to be put together at every step."""
    return columns is not None and other is not None and columns <= WIDEST and columns * THIN <= other


def made(target: Any, args: tuple, value: Any, like: fx.Node, **kwargs: Any) -> fx.Node:
    """A new node at the graph's insertion point, with the provenance of another."""
    node = like.graph.call_function(target, args, kwargs)
    node.meta = {key: fact for key, fact in like.meta.items() if key not in ("val", "tensor_meta", "original_aten")}
    node.meta["val"] = value
    return node


def matrix_source(node: fx.Node) -> fx.Node:
    """What a matrix was transposed and cast from."""
    while node.op == "call_function" and node.target in (aten.t.default, aten._to_copy.default, aten.detach.default):
        node = node.args[0]  # type: ignore[assignment]
    return node
