"""The forward and the backward graph of a cut, for simulation: as AOTAutograd's partitioner will make them, without compiling anything.

Order is what the partitioner gives: the forward's own, and in the backward each recomputed value right before the first operation
that needs it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from ..bufferize import drop_unread_outputs
from ..products.arrange import Rules, arrange_products
from ..reporting.records import GraphRecord
from ..reuse import mark_donated
from .absorb import absorb_sums
from .joint import forward_outputs
from .merge import merge_recomputed
from .splits import Joint, Split


def halves(joint: Joint) -> tuple[fx.Graph, fx.Graph]:
    """Copies of the two halves, forward and backward, of a joint graph in which a choice was carried out; nodes keep their names."""
    split = joint.plain
    outputs = forward_outputs(joint.graph, joint.num_fwd_outputs)
    forward = fx.Graph()
    copies = {node: forward.node_copy(node) for node in joint.placeholders}
    wanted = [*outputs, *split.saved, *split.inputs]
    for node in joint.graph.nodes:
        if node in joint.forward and node not in copies:
            copies[node] = forward.node_copy(node, copies.__getitem__)
    forward.output([copies.get(node, node) if isinstance(node, fx.Node) else node for node in wanted])
    first, second = _module(forward), _module(_backward(joint, split))
    merge_recomputed(second)
    absorb_sums(second)
    mark_donated(first, second, joint.num_fwd_outputs)
    for half in (first, second):
        drop_unread_outputs(half)
        arrange_products(half, GraphRecord(""), Rules(lambda rule: "", validate="off"))
    return first.graph, second.graph


def _module(graph: fx.Graph) -> fx.GraphModule:
    """A module for a graph that is only looked at: its constants are there by name alone."""
    return fx.GraphModule({str(node.target): torch.empty(0) for node in graph.find_nodes(op="get_attr")}, graph)


def _backward(joint: Joint, split: Split) -> fx.Graph:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in (*joint.placeholders, *split.saved, *_sizes(joint), *joint.tangents):
        if node not in copies:
            copies[node] = graph.placeholder(node.name)
            copies[node].meta = dict(node.meta)
    order = {node: i for i, node in enumerate(joint.graph.nodes)}
    started = not joint.tangents
    for node in joint.graph.nodes:
        started = started or any(used in joint.tangents for used in node.all_input_nodes)
        if started and node.op == "call_function" and node not in joint.forward:
            for needed in sorted(_missing(node, copies), key=order.__getitem__):
                copies[needed] = graph.node_copy(needed, copies.__getitem__)
    results = [result for result in joint.gradients.values() if isinstance(result, fx.Node)]
    for result in results:
        for needed in sorted(_missing(result, copies), key=order.__getitem__):
            copies[needed] = graph.node_copy(needed, copies.__getitem__)
    graph.output([copies[result] for result in results])
    graph.eliminate_dead_code()
    return graph


def _missing(node: fx.Node, copies: dict[fx.Node, fx.Node]) -> set[fx.Node]:
    """What has to run for this node, and the node."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current not in copies and current not in found:
            found.add(current)
            pending += current.all_input_nodes
    return found


def _sizes(joint: Joint) -> Iterable[fx.Node]:
    """Sizes that the forward computes; AOTAutograd saves those that the backward reads."""
    return [node for node in joint.graph.nodes if node in joint.forward and node.op == "call_function"
            and not isinstance(node.meta.get("val"), (Tensor, tuple, list))]
