"""What comes after the losses of the rows, where it is their weighted sum: the gradient is known in the forward then, but for a factor.

    losses -> * mask -> sum -> / count          weights of the rows: the mask; the count divides the sum of the rows

Signs, numbers and single values are factors of the whole sum, and stay outside of it: gradients that the forward stores have no 1/N
in them. A chain that is anything else (a sum for each sequence, a logarithm) gives each row a cotangent of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx

from ..canonical.facts import known_dtype, known_shape, same_shape, tensor_of
from ..canonical.vocabulary import CAST, aten
from ..regions.region import OutputView, call

_SUMS = ("sum", aten.sum.default, torch.sum)
_MEANS = ("mean", aten.mean.default, torch.mean)
_VIEWS = (aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim)


class Step(NamedTuple):
    """One operation of the chain: negation (no other operand), or a product or quotient with a value that is no loss."""

    operation: Any
    other: Any = None

    @property
    def by_row(self) -> bool:
        """Is the other operand a number for each row."""
        return isinstance(self.other, fx.Node) and tensor_of(self.other) is not None and len(known_shape(self.other)) > 0


@dataclass
class Tail:
    """nodes: the chain from after the rows to their sum, which it includes; empty where a loss sums its rows itself
    steps: what the chain does, without its views        mean: the sum is divided by the number of rows
    """

    nodes: list[fx.Node] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    mean: bool = False

    @property
    def total(self) -> fx.Node | None:
        """The node that is the sum (or mean) of the rows."""
        return self.nodes[-1] if self.nodes else None

    def row_weight(self, graph: fx.Graph) -> fx.Node | None:
        """The product of what the rows are multiplied by, [rows], or None where that is 1."""
        product: fx.Node | None = None
        for step in self.steps:
            if not step.by_row:
                continue
            factor = step.other
            wide = factor if known_dtype(factor) == torch.float32 else call(graph, factor, CAST, factor, torch.float32)
            wide = call(graph, factor, aten.reshape.default, wide, [-1])
            if product is not None:
                product = call(graph, factor, step.operation, product, wide)
            else:
                product = wide if step.operation is aten.mul.Tensor else call(graph, factor, aten.reciprocal.default, wide)
        return product

    def finish(self, graph: fx.Graph, total: fx.Node, rows: Any) -> fx.Node:
        """What the chain makes of the weighted sum of the rows."""
        last = self.nodes[-1]
        for operation, *other in (step for step in self.steps if not step.by_row):
            total = call(graph, last, operation, total, *(x for x in other if x is not None))
        return call(graph, last, aten.div.Tensor, total, rows) if self.mean else total

    def replay(self, graph: fx.Graph, rows: fx.Node, copies: Callable[[fx.Node, tuple[Any, ...] | None], fx.Node]) -> Tail:
        """The chain on the rows [n] of another graph, without views. ``copies(node, shape)``: what a node is there."""
        nodes: list[fx.Node] = []
        steps: list[Step] = []
        shape = tuple(known_shape(rows))
        for step in self.steps:
            other = step.other
            if isinstance(other, fx.Node):
                other = copies(other, shape if step.by_row else None)
            steps.append(Step(step.operation, other))
            rows = call(graph, rows, step.operation, rows, *(() if other is None else (other,)))
            nodes.append(rows)
        nodes.append(call(graph, rows, aten.mean.default if self.mean else aten.sum.default, rows))
        return Tail(nodes, steps, self.mean)


def tail_of(view: OutputView, differentiable: Collection[fx.Node]) -> Tail | None:
    """The weighted sum that the first output of a region ends in, or None where it does not."""
    if view.loss_reduction in (1, 2):
        return Tail()
    node, tail = view.node, Tail()
    if known_dtype(node) != torch.float32:
        return None
    while True:
        readers = [user for user in node.users if not _only_looks(user)]
        if len(readers) != 1:
            return None
        user = readers[0]
        tail.nodes.append(user)
        if kind := total_kind(user, node):
            tail.mean = kind == "mean"
            return tail
        if not _step(tail, user, node, differentiable):
            return None
        node = user


def _only_looks(user: fx.Node) -> bool:
    """A value that no gradient comes back through."""
    return (user.op == "call_method" and user.target == "detach") or user.target is aten.detach.default


def total_kind(user: fx.Node, node: fx.Node) -> str:
    """Is a node the sum or the mean of all elements."""
    if tensor_of(user) is None or len(known_shape(user)) != 0 or known_dtype(user) != torch.float32 or user.kwargs:
        return ""
    if user.args != (node,):
        return ""
    return "sum" if user.target in _SUMS else "mean" if user.target in _MEANS else ""


def _step(tail: Tail, user: fx.Node, node: fx.Node, differentiable: Collection[fx.Node]) -> bool:
    """Take one more operation of the chain in, if it is linear in the rows."""
    if tensor_of(user) is None or known_dtype(user) != torch.float32 or user.kwargs:
        return False
    if user.target in _VIEWS:
        return user.args[0] is node
    if user.target is aten.neg.default:
        tail.steps.append(Step(aten.neg.default))
        return True
    if user.target not in (aten.mul.Tensor, aten.div.Tensor) or not same_shape(user, node):
        return False
    first, second = user.args
    if first is not node and (second is not node or user.target is aten.div.Tensor):
        return False
    other = second if first is node else first
    if other is node or other in differentiable:
        return False
    step = Step(user.target, other)
    tail.steps.append(step)
    return not step.by_row or same_shape(other, node)
