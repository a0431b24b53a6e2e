"""What lives while a graph runs: a simulation over its nodes, for fake values, in the order in which they run.

A value's memory is made by the operation that computes it and freed after the last one that looks at it, through any view. Four
things make less than that live, and are counted as they will be: outputs of fused ops that lie where an operand lay (``reuse.py``),
sums that are accumulated into an operand that dies there (``products/``), views, and inputs that belong to somebody else.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..reuse import plan_reuse
from .joint import is_rows, is_view
from .sizes import Sizes

aten = torch.ops.aten
# Sums and products whose first operand can take the result, where it dies there.
_ACCUMULATING = frozenset(op.default for op in (aten.addmm, aten.baddbmm)) | {aten.add.Tensor}


@dataclass
class Lives:
    """What a simulation found.

    peak:   the most bytes that live at once
    at:     the node that runs then
    alive:  what lives then, largest first: (node, bytes)
    after:  bytes alive at the end: the outputs
    """

    peak: int = 0
    at: fx.Node | None = None
    alive: list[tuple[fx.Node, int]] = field(default_factory=list)
    after: int = 0


class Timeline:
    """When each value of a graph comes and goes; made once, run for its bytes at any sizes."""

    def __init__(self, graph: fx.Graph, *, foreign: Collection[fx.Node] = (), held: Collection[fx.Node] = (),
                 uncounted: Collection[fx.Node] = ()) -> None:
        """
        foreign:   inputs that are not counted at all (weights)
        held:      inputs that are counted, and that somebody holds to the end (gradients that arrive)
        uncounted: results that are counted elsewhere from the time they are made (gradients of weights)
        """
        nodes = list(graph.nodes)
        roots = storage_roots(graph)
        apart = {roots[node] for node in (*foreign, *uncounted) if node in roots}
        kept = {roots[node] for node in (*held, *graph.output_node().all_input_nodes) if node in roots} | apart

        def counted(found: Iterable[fx.Node]) -> list[fx.Node]:
            return [node for node in found if roots.get(node) is node and node not in apart]

        ends = last_uses(nodes, roots)
        self.given = counted(graph.find_nodes(op="placeholder"))
        self.steps = [(node, counted(_makes(node)) if node.op == "call_function" else [],
                       [root for root in ends.get(position, ()) if root not in kept])
                      for position, node in enumerate(nodes) if node.op != "output"]

    def run(self, sizes: Sizes, scratch: Callable[[fx.Node], int] = lambda node: 0) -> Lives:
        """The most that lives at once. ``scratch``: bytes that an operation needs for itself while it runs."""
        alive = {node: sizes.bytes(node.meta.get("val")) for node in self.given}
        live = sum(alive.values())
        lives = Lives(peak=live)
        for node, makes, ends in self.steps:
            for made in makes:
                alive[made] = sizes.bytes(made.meta.get("val"))
                live += alive[made]
            if node.op == "call_function":
                need = live + scratch(node)
                if need > lives.peak:
                    lives.peak, lives.at, lives.alive = need, node, list(alive.items())
            for root in ends:
                live -= alive.pop(root, 0)
        lives.after = live
        lives.alive.sort(key=lambda entry: -entry[1])
        return lives


def storage_roots(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """For each node that holds a tensor, the one whose memory it lies in."""
    reuse = plan_reuse(graph)
    order = {node: i for i, node in enumerate(graph.nodes)}
    roots: dict[fx.Node, fx.Node] = {}
    aliases: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and node.target is operator.getitem:
            source, index = node.args
            taken = reuse[source].outputs[index] if source in reuse and isinstance(index, int) else None
            several = isinstance(source.meta.get("val"), (tuple, list))
            roots[node] = roots[source.args[0][taken]] if taken is not None else node if several else roots.get(source, node)
        elif is_view(node) and node.args[0] in roots:
            roots[node] = roots[node.args[0]]
        elif node.op != "output" and isinstance(value, Tensor):
            into = _accumulates_into(node, roots, aliases, order)
            roots[node] = node if into is None else roots[into]
        if node in roots:
            aliases.setdefault(roots[node], []).append(node)
    return roots


def _accumulates_into(node: fx.Node, roots: dict[fx.Node, fx.Node], aliases: dict[fx.Node, list[fx.Node]],
                      order: dict[fx.Node, int]) -> fx.Node | None:
    """The operand of a sum that the result will be written over: one made in this graph, as large, that nothing reads later."""
    if node.op != "call_function" or node.target not in _ACCUMULATING:
        return None
    value = node.meta["val"]
    for operand in node.args[:2] if node.target is aten.add.Tensor else node.args[:1]:
        if not isinstance(operand, fx.Node) or operand not in roots or roots[operand].op == "placeholder":
            continue
        other = operand.meta["val"]
        if not isinstance(other, Tensor) or other.dtype != value.dtype or other.dim() != value.dim():
            continue
        if not all(statically_known_true(a == b) for a, b in zip(other.shape, value.shape, strict=True)):
            continue
        if all(order[user] <= order[node] for alias in aliases[roots[operand]] for user in alias.users):
            return operand
    return None


def last_uses(nodes: Sequence[fx.Node], roots: dict[fx.Node, fx.Node]) -> dict[int, list[fx.Node]]:
    """Position in the graph -> roots that nothing looks at after it."""
    last: dict[fx.Node, int] = {}
    for position, node in enumerate(nodes):
        if node in roots:
            last[roots[node]] = position
        for used in node.all_input_nodes:
            if used in roots:
                last[roots[used]] = position
            elif isinstance(used.meta.get("val"), (tuple, list)):
                for part in used.users:
                    if part in roots:
                        last[roots[part]] = max(last.get(roots[part], 0), position)
    ends: dict[int, list[fx.Node]] = {}
    for root, position in last.items():
        ends.setdefault(position, []).append(root)
    return ends


def _makes(node: fx.Node) -> list[fx.Node]:
    """The nodes whose memory comes to be when ``node`` runs."""
    if node.target is operator.getitem and isinstance(node.args[0].meta.get("val"), (tuple, list)):  # type: ignore[union-attr]
        return []
    if is_rows(node) or isinstance(node.meta.get("val"), (tuple, list)):
        return [user for user in node.users if user.target is operator.getitem]
    return [node]
