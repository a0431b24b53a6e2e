"""What a canonical graph does not need: neutral arithmetic, copies like the original, repeated and dead nodes."""

from __future__ import annotations

import operator
from collections.abc import Hashable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .aliasing import storage_of, written_by, written_storages
from .builder import stands_for
from .facts import requires_grad, same_strides, tensor_of
from .vocabulary import CANONICAL, aten, reader_of

_NEUTRAL = {aten.mul.Tensor: 1, aten.div.Tensor: 1, aten.add.Tensor: 0, aten.sub.Tensor: 0}
_LOGGING = frozenset([torch._C._log_api_usage_once])
_SOURCES = frozenset([torch.arange, torch.zeros, torch.ones, torch.full, torch.tensor, torch.empty, torch.finfo, torch.view_as_complex,
                      torch.view_as_real, torch.Size, getattr, operator.getitem,
                      aten.sym_size.int])  # fmt: skip
_METHODS = frozenset(["size", "dim", "new_ones", "new_zeros"])
_SHARED = CANONICAL | {aten.sym_size.int, torch.view_as_real}


def clean(gm: GraphModule) -> None:
    written = written_storages(gm)
    for node in list(gm.graph.nodes):
        if (original := _neutral(node) or _needless_copy(node, written)) is not None:
            node.replace_all_uses_with(original)
            gm.graph.erase_node(node)
    share(gm, written)
    drop_dead(gm)


def _neutral(node: Node) -> Node | None:
    """The operand of ``x * 1``, ``x / 1``, ``x + 0`` and ``x - 0``, which is the result."""
    neutral = _NEUTRAL.get(node.target)
    if neutral is None or isinstance(node.args[1], Node) or node.args[1] != neutral:
        return None
    x = node.args[0]
    return x if isinstance(x, Node) and stands_for(x, node) and not _escapes(node, x, frozenset()) else None


def _needless_copy(node: Node, written: frozenset[int | None]) -> Node | None:
    """The operand of a copy that lies as the original does, where neither is written into or given out."""
    if node.target is not aten.clone.default:
        return None
    x = node.args[0]
    if not same_strides(tensor_of(x), tensor_of(node)):
        return None
    return None if _escapes(node, x, written) else x


def _escapes(copy: Node, original: Node, written: frozenset[int | None]) -> bool:
    """Could somebody outside, or an in-place operation, tell the copy from the original."""
    if storage_of(copy) in written or storage_of(original) in written:
        return True
    return _reaches_output(copy)


def _reaches_output(node: Node) -> bool:
    """Is the node, or a view of it, an output."""
    return any(user.op == "output" or (storage_of(user) == storage_of(node) and _reaches_output(user)) for user in node.users)


def share(gm: GraphModule, written: frozenset[int | None]) -> None:
    """One node for equal computations that carry no gradient.

    Two computations that do carry one stay apart: their gradients are rounded before they are added, and sharing would add first.
    """
    first: dict[Hashable, Node] = {}
    for node in list(gm.graph.nodes):
        if not _shareable(node, written):
            continue
        key = _key(node)
        if (same := first.get(key)) is None:
            first[key] = node
        else:
            node.replace_all_uses_with(same)
            gm.graph.erase_node(node)


def _shareable(node: Node, written: frozenset[int | None]) -> bool:
    if node.target not in _SHARED or requires_grad(node) or node.target is aten.clone.default or _reaches_output(node):
        return False
    return not any(storage_of(x) in written for x in (node, *node.all_input_nodes))


def _key(node: Node) -> Hashable:
    return node.target, _hashable(node.args), _hashable(tuple(sorted(node.kwargs.items())))


def _hashable(value: Any) -> Hashable:
    if isinstance(value, (tuple, list)):
        return tuple(_hashable(v) for v in value)
    return value if isinstance(value, Node) else (type(value), repr(value))


def drop_dead(gm: GraphModule) -> None:
    """Erase unused nodes that are known to do nothing but compute."""
    for node in reversed(list(gm.graph.nodes)):
        if node.target in _LOGGING or (not node.users and _only_computes(node)):
            gm.graph.erase_node(node)


def _only_computes(node: Node) -> bool:
    if node.op not in ("call_function", "call_method") or written_by(node):
        return False
    if node.target in CANONICAL or node.target in _SOURCES or node.target in _METHODS:
        return True
    return reader_of(node) is not None and node.target not in (torch.nn.functional.dropout, torch.dropout, "dropout")
