"""Two launches of one program become one, where neither needs the other: the rotations of query and key, and their adjoints.

The pair stands where the later of the two stood; what reads the earlier one moves behind it. So only ops that stand close together
are paired: nothing lives much longer. What cannot share a kernel after all, the launcher runs as two.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable

from torch import fx

from .lowering import pair_launcher
from .memory.joint import is_rows
from .surgery import sort_topologically

REACH = 64  # nodes between the two


def pair_launches(graph: fx.Graph, device_of: Callable[[fx.Node], str]) -> int:
    """Replace pairs of fused ops of equal programs by calls of one launcher, in place; returns how many."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    by_text: dict[str, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if is_rows(node) and node.users and device_of(node) == "cuda":
            by_text[node.args[1]].append(node)
    count = 0
    for text, nodes in by_text.items():
        while len(nodes) > 1:
            first = nodes.pop(0)
            near = [node for node in nodes if order[node] - order[first] <= REACH and not _depends(node, first, order)]
            if near:
                nodes.remove(near[0])
                _pair(graph, text, first, near[0])
                count += 1
    if count:
        sort_topologically(graph)
    return count


def _depends(later: fx.Node, earlier: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Does ``later`` need a value computed from ``earlier``? (A pair made before has no place in the order: it is looked through.)"""
    pending, seen = list(earlier.users), set()
    while pending:
        node = pending.pop()
        if node is later:
            return True
        if node not in seen and order.get(node, 0) < order[later]:
            seen.add(node)
            pending += node.users
    return False


def _pair(graph: fx.Graph, text: str, first: fx.Node, second: fx.Node) -> None:
    with graph.inserting_before(second):
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
