"""Transposes of matrices move behind the casts and factors that follow them, where they cancel with the next one.

The gradient of B in ``addmm(c, h, B')`` comes out as ``cast(s * (dY' h)')'``: without the two transposes it is laid out as B is, and
autograd can keep it as it stands.
"""

from __future__ import annotations

import torch
from torch import fx

from ..memory.joint import forward_outputs

aten = torch.ops.aten
_ELEMENTWISE = (aten._to_copy.default, aten.mul.Scalar, aten.mul.Tensor)


def cancel_transposes(joint: fx.GraphModule, num_fwd_outputs: int) -> None:
    """In place, on a joint graph. What the forward returns keeps its views: AOTAutograd knows of which inputs they are views."""
    graph = joint.graph
    kept = set(forward_outputs(graph, num_fwd_outputs))
    for node in list(graph.nodes):
        if node.op != "call_function" or node in kept:
            continue
        if node.target in _ELEMENTWISE and _transposes(node.args[0]) and not _has_more_operands(node):
            _swap(node)
        elif _transposes(node) and _transposes(node.args[0]) and node.args[0] not in kept:
            node.replace_all_uses_with(node.args[0].args[0])  # type: ignore[union-attr, arg-type]
    graph.eliminate_dead_code()


def _transposes(node: object) -> bool:
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    return node.target is aten.t.default or (node.target is aten.permute.default and list(node.args[1]) == [1, 0])  # type: ignore[call-overload, arg-type]


def _has_more_operands(node: fx.Node) -> bool:
    """Are there operands besides the first that are tensors (whose layout would matter)."""
    return any(isinstance(argument, fx.Node) for argument in node.args[1:])


def _swap(node: fx.Node) -> None:
    """``f(x')`` becomes ``f(x)'``."""
    transposed: fx.Node = node.args[0]  # type: ignore[assignment]
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dim() != 2 or "memory_format" in node.kwargs:
        return
    with node.graph.inserting_before(node):
        inner = node.graph.call_function(node.target, (transposed.args[0], *node.args[1:]), dict(node.kwargs))  # type: ignore[arg-type]
        outer = node.graph.call_function(aten.t.default, (inner,))
    inner.meta, outer.meta = dict(node.meta), dict(node.meta)
    inner.meta["val"] = value.t()
    node.replace_all_uses_with(outer)
    node.graph.erase_node(node)
