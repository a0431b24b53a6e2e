"""Graph surgery: the nodes of a region become one fused op, views before and after it.

The graph stays functional. A region is convex but not contiguous, so the graph is sorted once at the end; nodes keep
their order wherever their operands allow.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import fx

from ._torch import FakeTensor
from .canonical.facts import known_tensor
from .canonical.vocabulary import CANONICAL
from .fused_op import fake_rows, rows
from .program import Program
from .regions import Region


def replace_region(graph: fx.Graph, region: Region, program: Program) -> dict[fx.Node, fx.Node]:
    """Put a fused op in place of a region. ``program`` is the region's, perhaps with more outputs.

    Returns what stands for each of the region's outputs now. The caller sorts the graph when all regions are replaced.
    """
    moved: dict[fx.Node, fx.Node] = {}
    order = {node: i for i, node in enumerate(graph.nodes)}
    last = max(region.nodes, key=order.__getitem__)
    with graph.inserting_after(last):
        anchor = graph.call_function(rows, ([], ""))
    with graph.inserting_before(anchor):
        operands = [view.insert(graph) for view in region.arguments]
    by_name = dict(zip((a.name for a in region.program.arguments), operands, strict=True))
    operands = [by_name[argument.name] for argument in program.arguments]
    anchor.args = (operands, str(program))
    _describe(anchor, region, program)
    after = next(iter(reversed(region.nodes)))
    point = anchor
    values: dict[str, fx.Node] = {}
    for index, output in enumerate(program.outputs):
        with graph.inserting_after(point):
            point = graph.call_function(operator.getitem, (anchor, index))
        point.meta = {key: value for key, value in after.meta.items() if key in _KEPT}
        point.meta["example_value"] = anchor.meta["example_value"][index]
        values[output.name] = point
    with graph.inserting_before(point.next):
        for view in region.outputs:
            result = view.insert(graph, [values[name] for name in view.names])
            result.meta = {**view.node.meta, **{k: v for k, v in result.meta.items() if k == "example_value"}}
            view.node.replace_all_uses_with(result)
            moved[view.node] = result
    erase_unused([*region.nodes, *values.values()])
    return moved


_KEPT = ("nn_module_stack", "stack_trace", "source_fn_stack", "seq_nr", "custom")


def _describe(op: fx.Node, region: Region, program: Program) -> None:
    """What the op gives, as facts for later readers of the graph."""
    telling = region.outputs[-1].node
    op.meta = {key: value for key, value in telling.meta.items() if key in _KEPT}
    tensors = [known_tensor(operand) for operand in op.args[0]]
    mode = next((t.fake_mode for t in tensors if isinstance(t, FakeTensor)), nullcontext())
    with mode, torch.no_grad():
        op.meta["example_value"] = fake_rows(tensors, str(program))


def erase_unused(nodes: Sequence[fx.Node]) -> None:
    """Erase those nodes that nothing uses any more, users before what they use."""
    graph = nodes[0].graph
    members = set(nodes)
    for node in reversed(list(graph.nodes)):
        if node in members and not node.users:
            graph.erase_node(node)


def erase_dead(graph: fx.Graph) -> None:
    """Erase canonical operations that nothing uses. Only these: of others, in-place methods say, torch.fx does not know
    that they do something.
    """
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op == "call_function" and (node.target in CANONICAL or node.target in _OURS):
            graph.erase_node(node)


_OURS = (rows, operator.getitem)


def sort_topologically(graph: fx.Graph) -> None:
    """Put every node after what it reads, otherwise in the order it was in."""
    nodes = list(graph.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    missing = {node: len(node.all_input_nodes) for node in nodes}
    ready = [order[node] for node in nodes if not missing[node]]
    heapq.heapify(ready)
    previous = graph._root
    while ready:
        node = nodes[heapq.heappop(ready)]
        previous.append(node)
        previous = node
        for user in node.users:
            missing[user] -= 1
            if not missing[user]:
                heapq.heappush(ready, order[user])
