"""Reading a joint graph: what is forward, what the backward uses of it, what is a view of what."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from ..fused_op import rows
from ..program import Program, parse

# Views that their schema does not call views.
_UNTOLD_VIEWS = (torch.ops.aten._unsafe_view.default,)


def is_rows(node: Any) -> bool:
    """Is this a fused op."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is rows


def program_of(node: fx.Node) -> Program:
    return parse(node.args[1])


def outputs_of(node: fx.Node) -> dict[int, fx.Node]:
    """The getitem of each output of a fused op that anything uses."""
    found: dict[int, fx.Node] = {}
    for user in node.users:
        if user.target is operator.getitem:
            found.setdefault(user.args[1], user)
    return found


def is_view(node: fx.Node) -> bool:
    """Does this node only look at its first argument's memory in another way."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return node.target.is_view or node.target in _UNTOLD_VIEWS


def base_of(node: fx.Node) -> fx.Node:
    """The node whose memory this one looks at."""
    while is_view(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def views_of(node: fx.Node, within: set[fx.Node]) -> Iterator[fx.Node]:
    """The node and its views, of those in a set."""
    yield node
    for user in node.users:
        if user in within and is_view(user) and user.args[0] is node:
            yield from views_of(user, within)


def forward_nodes(joint: fx.Graph, num_fwd_outputs: int) -> set[fx.Node]:
    """What the forward's outputs depend on, with the inputs of the graph."""
    found = {node for node in joint.nodes if node.op == "placeholder" and not is_tangent(node)}
    pending = [node for node in forward_outputs(joint, num_fwd_outputs) if isinstance(node, fx.Node)]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def forward_outputs(joint: fx.Graph, num_fwd_outputs: int) -> list[Any]:
    """The forward's own outputs; AOTAutograd puts them first."""
    return list(joint.output_node().args[0])[:num_fwd_outputs]


def is_tangent(node: fx.Node) -> bool:
    return node.op == "placeholder" and "tangents" in str(node.target)


def bytes_of(node: fx.Node) -> int:
    """Bytes of a tensor node; symbolic sizes by their hints, so only for comparisons."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return 0
    count = 1
    for size in value.shape:
        count *= size if isinstance(size, int) else size.node.hint or 1
    return count * value.element_size()


def depends(later: fx.Node, earlier: fx.Node) -> bool:
    """Does ``later`` need a value computed from ``earlier``."""
    pending, seen = list(earlier.users), set()
    while pending:
        node = pending.pop()
        if node is later:
            return True
        if node not in seen:
            seen.add(node)
            pending += node.users
    return False
