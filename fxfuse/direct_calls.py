"""The graph that runs calls torch's own bound functions, and the ops of fxfuse without a detour over the dispatcher.

``torch.ops.aten.mm.default(a, b)`` and ``torch.mm(a, b)`` do the same; the first finds its way through a schema at each call, which
takes twice as long on the host. Where a block is a hundred small kernels, the host is what is waited for. An op of fxfuse is Python
behind a dispatcher that it no longer needs once nothing is traced and autograd is elsewhere. Of views that are equal one is made.

This is a copy for running: the graph that reports and later passes look at keeps its words.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import fx

from .attention import flex_op
from .attention import op as attention_op
from .linear_loss import op as loss_op
from .row_selection import op as selection_op

aten = torch.ops.aten

METHODS: dict[Any, str] = {
    aten.view.default: "view",
    aten.t.default: "t",
    aten.permute.default: "permute",
    aten.transpose.int: "transpose",
    aten.unsqueeze.default: "unsqueeze",
    aten.squeeze.dim: "squeeze",
    aten.expand.default: "expand",
    aten.detach.default: "detach",
}
FUNCTIONS: dict[Any, Callable[..., Any]] = {
    aten.mm.default: torch.mm,
    aten.addmm.default: torch.addmm,
    aten.bmm.default: torch.bmm,
    aten.add.Tensor: torch.add,
    aten.sub.Tensor: torch.sub,
    aten.mul.Tensor: torch.mul,
    aten.neg.default: torch.neg,
    aten.cat.default: torch.cat,
    aten.clone.default: torch.clone,
    aten.empty_like.default: torch.empty_like,
    selection_op.spread_rows: selection_op._spread,
    selection_op.collect_rows: selection_op._collect,
    attention_op.attention: attention_op._run,
    attention_op.attention_backward: attention_op._run_backward,
    flex_op.flex_attention: flex_op._run,
    flex_op.flex_attention_backward: flex_op._run_backward,
    loss_op.linear_loss: loss_op._run,
    loss_op.linear_loss_backward: loss_op._run_backward,
}
_DEVICES = ("cpu", "cuda")


def with_direct_calls(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph whose calls are direct."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    views: dict[Hashable, fx.Node] = {}
    for node in gm.graph.nodes:
        key = _key(node, copies)
        if key is not None and key in views:
            copies[node] = views[key]
            continue
        copies[node] = copy = graph.node_copy(node, copies.__getitem__)
        _redirect(copy)
        if key is not None:
            views[key] = copy
    graph.set_codegen(gm.graph._codegen)
    return fx.GraphModule(gm, graph)


def _key(node: fx.Node, copies: dict[fx.Node, fx.Node]) -> Hashable | None:
    """What equal views have in common; None for what is no view."""
    if node.op != "call_function" or node.target not in METHODS or node.kwargs:
        return None
    args = fx.map_arg(node.args, copies.__getitem__)
    return node.target, tuple(tuple(a) if isinstance(a, list) else a for a in args)


def _redirect(node: fx.Node) -> None:
    if node.op != "call_function" or not _is_ordinary(node):
        return
    if node.target in METHODS and not node.kwargs:
        node.op, node.target = "call_method", METHODS[node.target]
    else:
        node.target = FUNCTIONS.get(node.target, node.target)


def _is_ordinary(node: fx.Node) -> bool:
    """Are its operands plain tensors on devices that the ops have the same code for."""
    tensors = [n.meta["val"] for n in (node, *node.all_input_nodes) if isinstance(n.meta.get("val"), torch.Tensor)]
    return all(t.device.type in _DEVICES for t in tensors)
