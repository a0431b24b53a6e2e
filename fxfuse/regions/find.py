"""Growing regions over a canonical graph.

One pass over the nodes in order. A fusible node joins the regions of its operands where its layout follows from theirs (layout.py),
where merging closes no cycle, and where nothing with an effect (a mutation, a change of grad or autocast mode) stands between. Then
views at the rim are given back, regions that are not worth a kernel are dropped, and the rest are built as row programs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import fx

from ..canonical.facts import (
    known_shape,
    known_tensor,
    module_path,
    requires_grad,
    shape_of,
    static_size,
    statically_one,
    tensor_inputs,
    user_line,
)
from ..canonical.vocabulary import aten
from ..program import ProgramError
from . import operations as ops
from .build import build_program
from .fusible import epochs_of, is_fusible, unfusible_macros
from .lanes import NotLanes
from .layout import Layout, propagate, starting_layout
from .region import Declined, Region

_FREE = {ops.CAST, ops.SLICE, ops.STACK, *ops.VIEWS, *ops.CONCATENATIONS, *ops.TRUTH_VALUED}


@dataclass
class Cluster:
    """Nodes with one domain, on the way to a region."""

    epoch: int
    rank: int
    nodes: dict[fx.Node, Layout] = field(default_factory=dict)


def find_regions(gm: fx.GraphModule) -> tuple[list[Region], list[Declined]]:
    """The regions of a canonical graph, in graph order, and the sites that were declined with their reasons. Changes nothing."""
    regions: list[Region] = []
    declined: list[Declined] = [*unfusible_macros(gm)]
    for cluster in _Growth(gm).clusters():
        for members in _components(_trimmed(cluster)):
            if not _worth_fusing(members):
                continue
            nodes = list(members)
            module, line = _site(nodes)
            outputs = _outputs(members, cluster.rank)
            if not outputs:
                continue
            try:
                program, arguments, views = build_program(members, outputs, cluster.rank)
            except (NotLanes, ProgramError) as reason:
                declined.append(Declined(module, str(reason), nodes=nodes))
                continue
            regions.append(Region(program, arguments, views, nodes, module, line))
    return regions, declined


class _Growth:
    def __init__(self, gm: fx.GraphModule) -> None:
        self.order = {node: i for i, node in enumerate(gm.graph.nodes)}
        self.epochs = epochs_of(gm.graph)
        self.owner: dict[fx.Node, Cluster] = {}

    def clusters(self) -> list[Cluster]:
        for node in self.order:
            if is_fusible(node):
                self._place(node)
        unique = {id(cluster): cluster for cluster in self.owner.values()}
        return list(unique.values())

    def _place(self, node: fx.Node) -> None:
        """Join the clusters of the operands, or open a new one."""
        home: Cluster | None = None
        for operand in tensor_inputs(node):
            cluster = self.owner.get(operand)
            if cluster is None or cluster is home or cluster.epoch != self.epochs[node]:
                continue
            if home is None:
                layout = propagate(node, cluster.nodes)
                if layout is not None and self._convex(cluster.nodes, [node]):
                    home = cluster
                    self._add(home, node, layout)
            else:
                self._absorb(home, cluster, node, operand)
        if home is not None:
            self._absorb_earlier(home, node)
            return
        layout = starting_layout(node)
        if layout is not None:
            cluster = Cluster(self.epochs[node], len(layout.dims))
            self._add(cluster, node, layout)
            self._absorb_earlier(cluster, node)

    def _absorb_earlier(self, home: Cluster, node: fx.Node) -> None:
        """Operands visited before the home was chosen (a weight plus one, a norm's row statistic) get their chance too."""
        for operand in tensor_inputs(node):
            cluster = self.owner.get(operand)
            if cluster is not None and cluster is not home and cluster.epoch == home.epoch:
                self._absorb(home, cluster, node, operand)

    def _add(self, cluster: Cluster, node: fx.Node, layout: Layout) -> None:
        cluster.nodes[node] = layout
        self.owner[node] = cluster

    def _absorb(self, home: Cluster, other: Cluster, node: fx.Node, operand: fx.Node) -> None:
        """Take another cluster in, if its domain is the home's (or it is a small column-only chain) and no cycle arises."""
        mapping = _domain_map(home.nodes[node], node, other, operand)
        if mapping is None or not self._convex(home.nodes, other.nodes):
            return
        for member, layout in other.nodes.items():
            dims = tuple(None if d is None else mapping.get(d) for d in layout.dims)
            self._add(home, member, Layout(dims, layout.column, layout.paired))
        home.nodes = dict(sorted(home.nodes.items(), key=lambda item: self.order[item[0]]))

    def _convex(self, nodes: Iterable[fx.Node], more: Iterable[fx.Node]) -> bool:
        """Does no path leave the merged set and come back, also through other clusters (each of which is one kernel)?"""
        merged = {*nodes, *more}
        last = max(self.order[node] for node in merged)
        frontier = [user for node in merged for user in node.users if user not in merged]
        seen: set[fx.Node] = set()
        while frontier:
            node = frontier.pop()
            if node in merged:
                return False
            if node in seen or (self.order[node] > last and node not in self.owner):
                continue
            seen.add(node)
            cluster = self.owner.get(node)
            fellows = cluster.nodes if cluster is not None and not cluster.nodes.keys() & merged else (node,)
            for fellow in fellows:
                seen.add(fellow)
                frontier.extend(user for user in fellow.users if user not in seen)
        return True


def _domain_map(
    layout: Layout, node: fx.Node, other: Cluster, operand: fx.Node
) -> dict[int, int | None] | None:
    """Where the other cluster's domain dimensions lie in the home's, read off the node that joins them."""
    theirs = other.nodes[operand]
    if (
        theirs.paired
        or (theirs.column != layout.column and theirs.dims)
        or len(theirs.dims) > len(layout.dims)
    ):
        return None
    ours = layout.dims[len(layout.dims) - len(theirs.dims) :] if theirs.dims else ()
    mapping: dict[int, int | None] = {}
    shape = known_shape(operand)
    for position, (their, our) in enumerate(zip(theirs.dims, ours, strict=True)):
        if their is not None:
            broadcast = statically_one(shape[position]) and not _is_one(
                node, layout, position - len(theirs.dims)
            )
            mapping[their] = None if broadcast else our
    full = {d for d in mapping.values() if d is not None}
    if len(mapping) != other.rank:
        return None
    if not full:
        return (
            mapping if all(layout.column for layout in other.nodes.values()) else None
        )  # a column-only chain
    moves_only = all(
        member.target in _FREE and member.target not in ops.TRUTH_VALUED for member in other.nodes
    )
    return (
        mapping if full >= layout.covered or moves_only else None
    )  # a smaller domain would be computed again for every row


def _is_one(node: fx.Node, layout: Layout, position: int) -> bool:
    shape = known_shape(node)
    leading = shape[:-1] if layout.column else shape
    return len(leading) >= -position and statically_one(leading[position])


def _trimmed(cluster: Cluster) -> dict[fx.Node, Layout]:
    """Without views and casts that only look at the region from outside."""
    members = dict(cluster.nodes)
    changed = True
    while changed:
        changed = False
        for node in list(members):
            inside = any(user in members for user in node.users)
            fed = any(operand in members for operand in tensor_inputs(node))
            rim = not inside and (node.target in ops.VIEWS or node.target in (ops.SLICE, ops.STACK))
            head = not fed and (
                node.target in (ops.CAT, ops.STACK)
                or (node.target is ops.SLICE and not _slices_cover(node, members))
            )
            if rim or head or (node.target is ops.STACK and not fed):
                del members[node]
                changed = True
    return members


def _slices_cover(node: fx.Node, members: dict[fx.Node, Layout]) -> bool:
    """Do the region's slices of one outer tensor take every column once, so that its gradient is written once, in one piece?"""
    source = node.args[0]
    width = static_size(known_shape(source)[-1])
    if width is None:
        return False
    slices = [user for user in source.users if user.target is ops.SLICE and user in members]
    taken = [c for user in slices for c in range(*slice(*user.args[2:5]).indices(width))]
    return sorted(taken) == list(range(width)) and len(slices) > 1


def _components(members: dict[fx.Node, Layout]) -> list[dict[fx.Node, Layout]]:
    """Connected parts, each in graph order."""
    remaining, parts = dict(members), []
    while remaining:
        frontier, part = [next(iter(remaining))], set()
        while frontier:
            node = frontier.pop()
            if node in remaining and node not in part:
                part.add(node)
                frontier.extend([*tensor_inputs(node), *node.users])
        parts.append({node: layout for node, layout in members.items() if node in part})
        for node in part:
            del remaining[node]
    return parts


def _worth_fusing(members: dict[fx.Node, Layout]) -> bool:
    """A norm, softmax, loss or activation is; else two operations that compute."""
    if not any(layout.covered for layout in members.values()) and len(members) > 0:
        rows = any(len(layout.dims) > 0 for layout in members.values())
        if not rows and not any(
            node.target in ops.REDUCTIONS or node.target in ops.ROW_MACROS for node in members
        ):
            return False
    if any(node.target in ops.ROW_MACROS or node.target in ops.ACTIVATIONS for node in members):
        return True
    if any(_selects_rows(node) or _weighs_rows(node) for node in members):
        return True
    return sum(node.target not in _FREE for node in members) >= 2


def _selects_rows(node: fx.Node) -> bool:
    """Does it clear or choose whole rows, as experts mask tokens? torch's kernel for a broadcast condition takes three times a copy."""
    if node.target not in ops.SELECTIONS:
        return False
    shape = known_shape(node)
    return len(shape) > 1 and statically_one(known_shape(node.args[0])[-1]) and not statically_one(shape[-1])


def _weighs_rows(node: fx.Node) -> bool:
    """Does it multiply rows by numbers that learn, as experts are weighed? Their gradient is a sum over a product that nobody needs."""
    shape = shape_of(node)
    if node.target is not aten.mul.Tensor or shape is None or len(shape) < 2 or statically_one(shape[-1]):
        return False
    weights = [known_shape(operand) for operand in tensor_inputs(node) if requires_grad(operand)]
    return any(len(w) == len(shape) and statically_one(w[-1]) and not statically_one(w[-2]) for w in weights)


def _outputs(members: dict[fx.Node, Layout], rank: int) -> list[fx.Node]:
    """Members that others read. A truth value or a chain over columns only is none: it stays in the graph beside the region."""
    return [
        node
        for node, layout in members.items()
        if any(user not in members for user in node.users)
        and known_tensor(node).is_floating_point()
        and not layout.paired
        and (node.target is ops.CROSS_ENTROPY or layout.covered == frozenset(range(rank)))
    ]


def _site(nodes: list[fx.Node]) -> tuple[str, str]:
    """The module path and source line of a region's most telling node."""
    telling = [
        n
        for n in nodes
        if n.target in ops.ROW_MACROS or n.target in ops.REDUCTIONS or n.target in ops.ACTIVATIONS
    ]
    node = (telling or nodes)[-1]
    return module_path(node), user_line(node)
