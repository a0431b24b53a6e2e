"""Masks that are false whatever the inputs are, by the range of the integers that they compare; what they select is dropped.

Indices that come from a sort or a top-k are below the length that was sorted. A model that may run with experts on several devices
masks the pairs whose expert is not here, ``expert >= number of experts``: on one device that compares indices below a number with
it. Nothing is assumed of values that come from outside.
"""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import GraphModule, Node

from .builder import stands_for
from .facts import known_shape, static_size, tensor_of
from .vocabulary import VIEWS, aten

_PICKS = {"topk": 1, "sort": 1, "max": 1, "min": 1}  # which part of the result holds indices; part 0 holds values of the operand
_INDICES = frozenset(["argsort", "argmax", "argmin"])
_MARGIN = {aten.ge.Scalar: 1, aten.gt.Scalar: 0}  # x >= c is false if x + 1 <= c, x > c if x <= c


def drop_dead_masks(gm: GraphModule) -> None:
    """Replace ``where(mask, a, b)`` by ``b`` where the mask is false everywhere, in place."""
    most: dict[Node, int] = {}
    false: set[Node] = set()
    for node in list(gm.graph.nodes):
        if node.op not in ("call_function", "call_method") or tensor_of(node) is None:
            continue
        bound = _largest(node, most)
        if bound is not None:
            most[node] = bound
        if _is_false(node, most, false):
            false.add(node)
        kept = _kept(node, false)
        if kept is not None and stands_for(kept, node):
            node.replace_all_uses_with(kept)
            gm.graph.erase_node(node)


def _name(node: Any) -> str:
    target = node.target if isinstance(node, Node) else ""
    return target if isinstance(target, str) else getattr(target, "__name__", "").split(".")[0]


def _largest(node: Node, most: dict[Node, int]) -> int | None:
    """A number that no element of an integer tensor is above, if one is known; elements are then at least 0."""
    operand = node.args[0] if node.args else None
    if not isinstance(operand, Node):
        return None
    if node.target in VIEWS or node.target is aten.clone.default:
        return most.get(operand)
    if node.target is operator.getitem and _name(operand) in _PICKS and operand.args and isinstance(operand.args[0], Node):
        picked = operand.args[0]
        return _last_index(operand, picked) if node.args[1] == _PICKS[_name(operand)] else most.get(picked)
    return _last_index(node, operand) if _name(node) in _INDICES else None


def _last_index(node: Node, picked: Node) -> int | None:
    """The last index along the dimension in which ``node`` sorts ``picked`` or picks from it."""
    if tensor_of(picked) is None or tensor_of(picked).dim() == 0:  # type: ignore[union-attr]
        return None
    place = 2 if _name(node) == "topk" else 1
    dim = node.kwargs.get("dim", node.args[place] if len(node.args) > place else None)
    if dim is None and _name(node) in ("sort", "argsort", "topk"):
        dim = -1
    if not isinstance(dim, int) or isinstance(dim, bool):
        return None
    size = static_size(known_shape(picked)[dim])
    return None if size is None else size - 1


def _is_false(node: Node, most: dict[Node, int], false: set[Node]) -> bool:
    operand = node.args[0] if node.args else None
    if not isinstance(operand, Node):
        return False
    if node.target in VIEWS:
        return operand in false
    if node.target not in _MARGIN or not isinstance(node.args[1], int) or operand not in most:
        return False
    return most[operand] + _MARGIN[node.target] <= node.args[1]


def _kept(node: Node, false: set[Node]) -> Node | None:
    """What ``node`` always gives: the operand that a false mask leaves."""
    if node.target in (aten.where.self, aten.where.ScalarSelf) and node.args[0] in false:
        kept = node.args[2]
        return kept if tensor_of(kept) is not None else None
    return None
