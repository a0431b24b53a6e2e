"""Where a joint graph is cut for a choice: what is saved, what is computed again, what the backward reads of the inputs.

The backward reads values of the forward. Each is an input, or is saved, or is computed again from such; a choice says which of the
values that are saved without a plan are computed again, and the rest follows: what they are made of is computed again as well, up
to what is saved. Some operations are never run twice: attention, what draws random numbers, what is not known to be a function of
its operands. Their results are saved wherever they are needed.

What is computed again is written out: copies of the operations, which belong to the backward, and which it reads in place of the
forward's. AOTAutograd's partitioner then finds them as it finds any operation of the backward.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import CheckpointPolicy

from ..surgery import sort_topologically
from .costs import Rates, milliseconds
from .joint import base_of, forward_nodes, forward_outputs, is_rows, is_tangent, is_view
from .recompute import RECOMPUTED, REPEATS, mark_backward
from .sizes import Sizes, is_symbolic

_KNOWN_LIBRARIES = ("aten", "prims", "fxfuse")


@dataclass
class Split:
    """One cut. All are nodes of the joint graph.

    saved:  results of the forward that are kept
    inputs: inputs of the block that the backward reads, and that are not weights
    again:  what is run again, that is not run again without a plan
    always: what is run again without a plan as well
    views:  how the backward looks at values of the forward; here alone are views
    """

    saved: dict[fx.Node, None] = field(default_factory=dict)
    inputs: dict[fx.Node, None] = field(default_factory=dict)
    again: dict[fx.Node, None] = field(default_factory=dict)
    always: dict[fx.Node, None] = field(default_factory=dict)
    views: dict[fx.Node, None] = field(default_factory=dict)


class Joint:
    """A joint graph as a plan sees it: tagged as without a plan, then asked what other choices would come to."""

    def __init__(self, graph: fx.Graph, num_fwd_outputs: int) -> None:
        self.graph = graph
        self.num_fwd_outputs = num_fwd_outputs
        self.forward = forward_nodes(graph, num_fwd_outputs)
        # Statistics that only the backward reads are results of the forward too.
        self.forward |= {user for node in self.forward for user in node.users if _is_part(user)}
        self.returned = {base_of(node) for node in forward_outputs(graph, num_fwd_outputs) if isinstance(node, fx.Node)}
        self.placeholders = [node for node in graph.find_nodes(op="placeholder") if not is_tangent(node)]
        self.tangents = [node for node in graph.find_nodes(op="placeholder") if is_tangent(node)]
        results = list(graph.output_node().args[0])[num_fwd_outputs:]  # type: ignore[arg-type]
        self.gradients = dict(zip(self.placeholders, results, strict=False))
        self.repeats = {node.meta[REPEATS]: node for node in graph.nodes if REPEATS in node.meta}
        self.reads = [(node, used) for node in graph.nodes if node not in self.forward and node.op != "output"
                      for used in node.all_input_nodes if used in self.forward]
        self.plain = Split(saved=dict.fromkeys(self.forward))  # no more is ever saved than without a plan:
        self.plain = self.split(())

    def is_activation(self, placeholder: fx.Node) -> bool:
        """Is an input of the graph made by the step, unlike a weight: has it a size that differs from call to call."""
        return is_symbolic(placeholder.meta.get("val"))

    def is_own(self, placeholder: fx.Node) -> bool:
        """Is an activation this block's alone, unlike masks and angles, which all blocks are given: a gradient goes back to it."""
        return self.is_activation(placeholder) and isinstance(self.gradients.get(placeholder), fx.Node)

    def split(self, recompute: Collection[str]) -> Split:
        """The cut in which the values named in ``recompute`` are not saved."""
        found = Split()
        pending = [used for _, used in reversed(self.reads)]
        seen: set[fx.Node] = set()
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            if node.op == "placeholder":
                if self.is_activation(node):
                    found.inputs[node] = None
            elif node.op != "call_function" or not _holds_tensor(node):
                continue
            elif is_view(node):
                found.views[node] = None
                pending += node.all_input_nodes
            elif self._is_saved(node, recompute):
                found.saved[node] = None
            elif node.name not in self.repeats:
                (found.always if _is_tagged(node) else found.again)[node] = None
                pending += reversed(node.all_input_nodes)
        return found

    def _is_saved(self, node: fx.Node, recompute: Collection[str]) -> bool:
        if node.target is not operator.getitem and isinstance(node.meta.get("val"), (tuple, list)):
            return False  # its parts are
        if _is_tagged(node):
            return False
        return runs_once(node) or (node.name not in recompute and node in self.plain.saved)

    def milliseconds(self, split: Split, sizes: Sizes, rates: Rates) -> float:
        """What running again takes."""
        return sum(milliseconds(node, sizes, rates) for node in split.again)

    def saved_bytes(self, split: Split, sizes: Sizes) -> int:
        """What is kept for the backward: results, each with all of the memory it lies in, and inputs that only this block holds."""
        kept = dict.fromkeys([*map(memory_of, split.saved), *(node for node in split.inputs if self.is_own(node))])
        return sum(sizes.bytes(node.meta.get("val")) for node in kept if node not in self.returned)


def memory_of(node: fx.Node) -> fx.Node:
    """The node that made the memory that a value lies in: a part of a packed projection, once saved, keeps all of it."""
    source = node.args[0] if node.args else None
    while isinstance(source, fx.Node) and (is_view(node) or (node.target is operator.getitem and is_view(source))):
        node, source = source, source.args[0] if source.args else None
    return node


def runs_once(node: fx.Node) -> bool:
    """Must this operation not be run again for the backward."""
    source = node.args[0] if node.target is operator.getitem else node
    if not isinstance(source, fx.Node) or source.op != "call_function":
        return True
    target = source.target
    if target is operator.getitem:
        return runs_once(source)
    if not isinstance(target, torch._ops.OpOverload):
        return True  # a higher-order operation
    if target.namespace not in _KNOWN_LIBRARIES or "attention" in target._schema.name:
        return True
    return torch.Tag.nondeterministic_seeded in target.tags or target._schema.is_mutable


def apply_choice(graph: fx.Graph, num_fwd_outputs: int, recompute: Collection[str], offload: Collection[str] = ()) -> None:
    """Carry a choice out on a joint graph that is tagged as without a plan, in place.

    Tensors named in ``offload`` get ``meta["offload"]``: they live on the host between forward and backward.
    """
    joint = Joint(graph, num_fwd_outputs)
    split = joint.split(recompute)
    for node in (*split.saved, *split.inputs):
        if node.name in offload:
            node.meta["offload"] = True
    if not split.again:
        return
    copies = {node: joint.repeats[node.name] for node in joint.forward if node.name in joint.repeats}
    for node in [n for n in graph.nodes if n in split.again or n in split.views]:
        if node in split.again or node.args[0] in copies:
            copies[node] = _again(node, copies)
    for reader, used in joint.reads:
        if used in copies and used.name not in joint.repeats:
            reader.replace_input_with(used, copies[used])
    sort_topologically(graph)
    graph.eliminate_dead_code()
    graph.lint()


def _again(node: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    """A copy of a forward operation that belongs to the backward."""
    with node.graph.inserting_after(node):
        copy = node.graph.node_copy(node, lambda used: copies.get(used, used))
    mark_backward(copy)
    if is_rows(copy):
        copy.meta[RECOMPUTED] = True
    return copy


def _is_tagged(node: fx.Node) -> bool:
    """Is this run again without a plan: a dequantization, a widening cast."""
    return node.meta.get("recompute") is CheckpointPolicy.MUST_RECOMPUTE


def _is_part(node: fx.Node) -> bool:
    """Is this one of an operation's several results."""
    return node.target is operator.getitem and isinstance(node.args[0].meta.get("val"), (tuple, list))  # type: ignore[union-attr]


def _holds_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, (Tensor, tuple, list))
