"""A region, and how its program's tensors are viewed from and back to graph nodes. Views only: nothing is copied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..canonical.facts import known_tensor, value_of
from ..program import Program

if TYPE_CHECKING:
    from .layout import Layout

aten = torch.ops.aten


def call(graph: fx.Graph, like: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A new node with the metadata of ``like`` and an example value computed on the arguments'."""
    node = graph.call_function(target, args)
    for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
        if key in like.meta:
            node.meta[key] = like.meta[key]
    node.meta["example_value"] = target(*fx.map_arg(args, value_of))
    return node


@dataclass(frozen=True)
class ArgumentView:
    """A program argument: a graph node, seen in the order of the domain with the columns last."""

    node: fx.Node
    layout: Layout
    rank: int

    def insert(self, graph: fx.Graph) -> fx.Node:
        """Nodes at the graph's insertion point that view ``node`` as a tensor of up to ``rank + 1`` dimensions."""
        value = self.node
        if not self.layout.column:
            value = call(graph, self.node, aten.unsqueeze.default, value, -1)
        all_dims = self.layout.dims
        for i in reversed(range(len(all_dims))):
            if all_dims[i] is None:
                value = call(graph, self.node, aten.squeeze.dim, value, i)
        dims = [d for d in all_dims if d is not None]
        order = sorted(range(len(dims)), key=dims.__getitem__)
        if order != list(range(len(dims))):
            value = call(graph, self.node, aten.permute.default, value, [*order, len(dims)])
        first = min(dims, default=self.rank)
        for d in range(first, self.rank):
            if d not in dims:
                value = call(graph, self.node, aten.unsqueeze.default, value, d - first)
        return value


@dataclass(frozen=True)
class OutputView:
    """A graph node recovered from program outputs: permuted back, or summed up when it is a loss.

    ``loss_reduction``: None, or torch's code for a cross-entropy over rows (0 none, 1 mean over counted rows, 2 sum).
    """

    node: fx.Node
    layout: Layout
    names: tuple[str, ...]
    loss_reduction: int | None = None

    def insert(self, graph: fx.Graph, values: Sequence[fx.Node]) -> fx.Node:
        """Nodes at the graph's insertion point that give ``node``'s value from the outputs in ``names``."""
        if self.loss_reduction is not None:
            return self._reduced_loss(graph, values)
        value, layout = values[0], self.layout
        present = sorted(d for d in layout.dims if d is not None)
        order = [present.index(d) for d in layout.dims if d is not None]
        if order != sorted(order):
            value = call(graph, self.node, aten.permute.default, value, [*order, len(order)])
        for i, dim in enumerate(layout.dims):
            if dim is None:
                value = call(graph, self.node, aten.unsqueeze.default, value, i)
        return value if layout.column else call(graph, self.node, aten.squeeze.dim, value, -1)

    def _reduced_loss(self, graph: fx.Graph, values: Sequence[fx.Node]) -> fx.Node:
        rows = [call(graph, self.node, aten.squeeze.dim, value, -1) for value in values]
        if self.loss_reduction == 0:
            result = rows[0]
        else:
            result = call(graph, self.node, aten.sum.default, rows[0])
            if self.loss_reduction == 1:
                result = call(
                    graph,
                    self.node,
                    aten.div.Tensor,
                    result,
                    call(graph, self.node, aten.sum.default, rows[1]),
                )
        wanted = known_tensor(self.node).dtype
        if known_tensor(result).dtype != wanted:
            result = call(graph, self.node, torch.ops.aten.to.dtype, result, wanted)
        return result


@dataclass
class Region:
    """Nodes that one row program replaces. ``arguments`` go with ``program.arguments``, ``outputs`` cover ``program.outputs``.

    After an argument's views and the fused call are inserted and outputs replaced, dead members are erased by the caller;
    members that others still use stay. The graph must be re-sorted topologically (the region is convex, not contiguous).
    """

    program: Program
    arguments: list[ArgumentView]
    outputs: list[OutputView]
    nodes: list[fx.Node]
    module: str
    line: str = ""


@dataclass(frozen=True)
class Declined:
    """A site that looked fusible and was left as it was, with the sentence that says why."""

    module: str
    reason: str
    rule: str = ""
    nodes: list[fx.Node] = field(default_factory=list)
