"""What lives while a graph runs: a simulation over its nodes, for fake values, in the order in which they run.

A value's memory is made by the operation that computes it and freed after the last one that looks at it, through any view. Outputs
of fused ops that lie where an operand lay (``reuse.py``) have no memory of their own, nor have matmuls that write where they are told.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from ..products import calls
from ..reuse import IN_PLACE, Reuse, plan_reuse
from .joint import is_rows, is_view
from .sizes import Sizes


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


@dataclass(frozen=True)
class Accounts:
    """What of a graph's values is counted, and for how long.

    foreign:   inputs that are not counted at all (weights)
    held:      inputs that are counted, and that somebody holds to the end (gradients that arrive)
    uncounted: results that are counted elsewhere from the time they are made (gradients of weights)
    """

    foreign: tuple[fx.Node, ...] = ()
    held: tuple[fx.Node, ...] = ()
    uncounted: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Moving:
    """Memory that others hold while a graph runs.

    start:       bytes at its beginning
    more, fewer: bytes that come before a node runs, and that go after it
    """

    start: int = 0
    more: Mapping[fx.Node, int] = field(default_factory=dict)
    fewer: Mapping[fx.Node, int] = field(default_factory=dict)

    def before(self, step: Sequence[fx.Node]) -> int:
        """Bytes that come before nodes that run together."""
        return sum(self.more.get(node, 0) for node in step) if self.more else 0

    def after(self, step: Sequence[fx.Node]) -> int:
        """Bytes that go after them."""
        return sum(self.fewer.get(node, 0) for node in step) if self.fewer else 0


STILL = Moving()


class Timeline:
    """When each value of a graph comes and goes; made once, run for its bytes at any sizes."""

    def __init__(self, graph: fx.Graph, accounts: Accounts = Accounts()) -> None:
        nodes = list(graph.nodes)
        roots = storage_roots(graph, plan_reuse(graph))
        apart = {roots[node] for node in (*accounts.foreign, *accounts.uncounted) if node in roots}
        kept = {roots[node] for node in (*accounts.held, *graph.output_node().all_input_nodes) if node in roots} | apart

        def counted(found: Iterable[fx.Node]) -> list[fx.Node]:
            return [node for node in found if roots.get(node) is node and node not in apart]

        ends = last_uses(nodes, roots)
        self.given = counted(graph.find_nodes(op="placeholder"))
        self.steps = [(node, counted(made_by(node)) if node.op == "call_function" else [],
                       [root for root in ends.get(position, ()) if root not in kept])
                      for position, node in enumerate(nodes) if node.op != "output"]

    def run(self, sizes: Sizes, scratch: Callable[[fx.Node], int] = lambda node: 0, moving: Moving = STILL) -> Lives:
        """The most that lives at once, with what is ``moving``. ``scratch``: bytes that an operation needs for itself while it runs."""
        alive = {node: sizes.bytes(node.meta.get("val")) for node in self.given}
        live = moving.start + sum(alive.values())
        lives = Lives(peak=live)
        for node, makes, ends in self.steps:
            live += moving.before((node,))
            for made in makes:
                alive[made] = sizes.bytes(made.meta.get("val"))
                live += alive[made]
            if node.op == "call_function":
                need = live + scratch(node)
                if need > lives.peak:
                    lives.peak, lives.at, lives.alive = need, node, list(alive.items())
            for root in ends:
                live -= alive.pop(root, 0)
            live -= moving.after((node,))
        lives.after = live
        lives.alive.sort(key=lambda entry: -entry[1])
        return lives


def storage_roots(graph: fx.Graph, reuse: Mapping[fx.Node, Reuse]) -> dict[fx.Node, fx.Node]:
    """For each node that holds a tensor, the one whose memory it lies in. ``reuse``: what the graph's fused ops take over."""
    roots: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        source = lies_in(node, reuse)
        if source in roots:
            roots[node] = roots[source]
        elif isinstance(node.meta.get("val"), Tensor) and node.op != "output":
            roots[node] = node
    return roots


def lies_in(node: fx.Node, reuse: Mapping[fx.Node, Reuse]) -> fx.Node | None:
    """The node in whose memory this one lies, if it makes none of its own."""
    source: Any = node.args[0] if node.args else None
    if node.target is not operator.getitem:
        return source if isinstance(source, fx.Node) and (is_view(node) or (node.target in IN_PLACE and not _copies(node))) else None
    index: Any = node.args[1]
    if source.target is calls.thin_pair:
        return source.args[0] if index == 0 else None
    if source in reuse:
        place = reuse[source].outputs[index]
        return None if place is None else source.args[0][place]
    return source.args[0] if is_view(source) else None


def _copies(node: fx.Node) -> bool:
    """Does an operation that looks for room in its operand's memory find none there, as nobody planned it."""
    return node.target in (calls.with_room, calls.beside, calls.below) and node.args[-1] is False


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


def made_by(node: fx.Node) -> list[fx.Node]:
    """The nodes whose memory comes to be when ``node`` runs."""
    if node.target is operator.getitem and isinstance(node.args[0].meta.get("val"), (tuple, list)):  # type: ignore[union-attr]
        return []
    if is_rows(node) or isinstance(node.meta.get("val"), (tuple, list)):
        return [user for user in node.users if user.target is operator.getitem]
    return [node]
