"""Views that cancel are taken out of a joint graph: each costs a dispatch at run time and hides what is the same tensor."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from .joint import forward_outputs

aten = torch.ops.aten
_RESHAPES = (aten.view.default, aten._unsafe_view.default)


def cancel_views(joint: fx.GraphModule, num_fwd_outputs: int) -> None:
    """In place: ``detach(x)`` and ``t(t(x))`` are x, a view of a view is one view, a view to the same shape is none.

    What the forward returns keeps its views: AOTAutograd has taken note of what its outputs are aliases of.
    """
    graph = joint.graph
    returned = set(forward_outputs(graph, num_fwd_outputs))
    for node in graph.nodes:
        if node.op != "call_function" or node in returned or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        source = node.args[0]
        if node.target is aten.detach.default or (node.target in _RESHAPES and _same_layout(node, source)):
            node.replace_all_uses_with(source)
        elif node.target is aten.t.default and source.target is aten.t.default:
            node.replace_all_uses_with(source.args[0])
        elif node.target is aten.view.default and source.target in _RESHAPES:
            node.replace_input_with(source, source.args[0])
            if _same_layout(node, node.args[0]):
                node.replace_all_uses_with(node.args[0])
    graph.eliminate_dead_code()


def _same_layout(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta.get("val"), b.meta.get("val")
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or x.dim() != y.dim() or x.dtype != y.dtype:
        return False
    known = torch.fx.experimental.symbolic_shapes.statically_known_true
    return all(known(p == q) for p, q in zip((*x.shape, *x.stride()), (*y.shape, *y.stride()), strict=True))
