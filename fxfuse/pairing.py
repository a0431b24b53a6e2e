"""Two launches of one program become one, where neither needs the other: the rotations of query and key, and their adjoints.

The pair stands before the first reader of either, if by then the operands of both are there; so nothing is moved and nothing lives
longer. What cannot share a kernel after all, the launcher runs as two.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable

from torch import fx

from .lowering import pair_launcher
from .memory.joint import is_rows


def pair_launches(graph: fx.Graph, device_of: Callable[[fx.Node], str]) -> int:
    """Replace pairs of fused ops of equal programs by calls of one launcher, in place; returns how many."""
    by_text: dict[str, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if is_rows(node) and device_of(node) == "cuda":
            by_text[node.args[1]].append(node)
    count = 0
    for text, nodes in by_text.items():
        while len(nodes) > 1:
            first = nodes.pop(0)
            partner = next((node for node in nodes if _may_pair(graph, first, node)), None)
            if partner is not None:
                nodes.remove(partner)
                _pair(graph, text, first, partner)
                count += 1
    return count


def _may_pair(graph: fx.Graph, first: fx.Node, second: fx.Node) -> bool:
    """Are all operands of both there before anything reads either?"""
    order = {node: i for i, node in enumerate(graph.nodes)}
    operands = [operand for node in (first, second) for operand in node.all_input_nodes]
    if any(operand in node.users for operand in operands for node in (first, second)):
        return False
    ready = max(order[operand] for operand in operands)
    reader = _first_reader(first, second, order)
    return reader is not None and ready < order[reader]


def _first_reader(first: fx.Node, second: fx.Node, order: dict[fx.Node, int]) -> fx.Node | None:
    readers = [user for node in (first, second) for output in node.users for user in output.users]
    return min(readers, key=order.__getitem__, default=None)


def _pair(graph: fx.Graph, text: str, first: fx.Node, second: fx.Node) -> None:
    order = {node: i for i, node in enumerate(graph.nodes)}
    reader = _first_reader(first, second, order)
    assert reader is not None
    with graph.inserting_before(reader):
        both = graph.call_function(pair_launcher(text), (first.args[0], second.args[0]))
        both.meta = {key: fact for key, fact in first.meta.items() if key != "val"}
        for index, node in enumerate((first, second)):
            results = graph.call_function(operator.getitem, (both, index))
            for output in list(node.users):
                fresh = graph.call_function(operator.getitem, (results, output.args[1]))
                fresh.meta = dict(output.meta)
                output.replace_all_uses_with(fresh)
                graph.erase_node(output)
            graph.erase_node(node)
