"""Cheap outputs of fused ops are computed again in the backward, where what they need is kept for it anyway.

A gated MLP needs ``silu(gate) * up`` for the gradient of its down projection, and keeps ``gate`` and ``up`` for the
derivative of the gate: so the product, a third of what eager keeps, can be had again for one pass. The same holds for
the output of a norm, whose input is kept for the norm's own backward, and for rotated queries after a norm.

The pass rewrites the joint graph: what the backward uses of such an output comes from a new fused op, which reads
what is saved (row statistics too, so that nothing is reduced twice). A matmul or attention is never computed again:
an output is recomputed only from values that the backward keeps for other reasons.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from ..fused_op import rows
from ..program import Output
from ..surgery import sort_topologically
from .joint import (
    base_of,
    bytes_of,
    forward_nodes,
    forward_outputs,
    is_rows,
    is_view,
    outputs_of,
    program_of,
    views_of,
)
from .restriction import restricted

RECOMPUTED = "fxfuse_recomputed"  # node.meta key of a fused op that this pass added
REPEATS = "fxfuse_repeats"  # of its output: the name of the forward's value that it equals
# An operand this much smaller than the output (a weight, a statistic, a table of angles) is worth keeping for it.
_SMALL = 8


# How many recomputed values may hang on one another. Without a bound, residual streams would be added up again from the first layer
# of a model to the last, all at the start of the backward, and all be alive then.
_DEPTH = 2


def recompute_cheap_outputs(joint: fx.GraphModule, num_fwd_outputs: int) -> int:
    """Let the backward compute cheap outputs again; returns how many."""
    graph = joint.graph
    work = _Recomputation(forward_nodes(graph, num_fwd_outputs))
    returned = {base_of(node) for node in forward_outputs(graph, num_fwd_outputs) if isinstance(node, fx.Node)}
    for node in list(graph.nodes):
        if node in work.forward and is_rows(node) and "recompute" not in node.meta:
            for index, output in outputs_of(node).items():
                if output not in returned and work.read_by_backward(output):
                    work.consider(node, index, output)
    if work.again:
        sort_topologically(graph)
        graph.lint()
        joint.recompile()
    return len(work.depth)


def _is_full(output: Output) -> bool:
    return output.columns is not None and not output.sums_rows


class _Recomputation:
    """``again``: what the backward reads in place of a forward value; ``depth``: on how many others such a value hangs."""

    def __init__(self, forward: set[fx.Node]) -> None:
        self.forward = forward
        self.again: dict[fx.Node, fx.Node] = {}
        self.depth: dict[fx.Node, int] = {}

    def read_by_backward(self, node: fx.Node) -> bool:
        """Does anything outside the forward use this value or a view of it."""
        return any(user not in self.forward for alias in views_of(node, self.forward) for user in alias.users)

    def consider(self, node: fx.Node, index: int, output: fx.Node) -> None:
        """Recompute one output of a fused op, if all that it needs is there."""
        program = program_of(node)
        declared = program.outputs[index]
        if not _is_full(declared):
            return
        siblings = {program.outputs[i].name: other for i, other in outputs_of(node).items()
                    if i != index and other not in self.again}
        readable = [name for name, other in siblings.items() if self.read_by_backward(other) or _is_small(other, output)]
        part = restricted(program, (declared.name,), tuple(readable))
        named = {a.name: tensor for a, tensor in zip(program.arguments, node.args[0], strict=True)} | siblings
        operands = [named[argument.name] for argument in part.arguments]
        if not all(self.is_available(operand, output) for operand in operands):
            return
        depth = 1 + max((self.depth.get(base_of(operand), 0) for operand in operands), default=0)
        fresh = _insert(node, output, str(part), [self.in_backward(operand) for operand in operands])
        self.again[output], self.depth[output] = fresh, depth
        self._redirect(output, fresh)

    def is_available(self, operand: fx.Node, output: fx.Node) -> bool:
        """Is a value in memory during the backward, whether or not ``output`` is recomputed from it."""
        base = base_of(operand)
        if _is_small(operand, output) or base not in self.forward:
            return True
        if base in self.again:
            return self.depth[base] < _DEPTH
        return self.read_by_backward(base)

    def in_backward(self, operand: fx.Node) -> fx.Node:
        """The value as the backward has it: recomputed, if it is a recomputed output or a view of one."""
        if operand in self.again:
            return self.again[operand]
        if not is_view(operand) or base_of(operand) not in self.again:
            return operand
        source = self.in_backward(operand.args[0])  # type: ignore[arg-type]
        with operand.graph.inserting_after(source):
            copy = operand.graph.node_copy(operand, lambda used: source if used is operand.args[0] else used)
        mark_backward(copy)
        self.again[operand] = copy
        return copy

    def _redirect(self, output: fx.Node, fresh: fx.Node) -> None:
        """What is not forward reads the recomputed value from now on, through views where it did."""
        for alias in list(views_of(output, self.forward)):
            ours = {fresh.args[0], *self.again.values()}
            readers = [user for user in alias.users if user not in self.forward and user not in ours]
            if readers:
                replacement = self.in_backward(alias)
                for reader in readers:
                    if reader is not replacement:
                        reader.replace_input_with(alias, replacement)


def _is_small(operand: fx.Node, output: fx.Node) -> bool:
    return bytes_of(operand) * _SMALL <= bytes_of(output)


def _insert(node: fx.Node, output: fx.Node, text: str, operands: list[fx.Node]) -> fx.Node:
    """The new fused op and its output; the graph is sorted when all are there."""
    graph = node.graph
    with graph.inserting_after(output):
        op = graph.call_function(rows, (list(operands), text))
    with graph.inserting_after(op):
        fresh = graph.call_function(operator.getitem, (op, 0))
    op.meta = {key: value for key, value in node.meta.items() if key != "recompute"}
    fresh.meta = {key: value for key, value in output.meta.items() if key != "recompute"}
    op.meta["val"] = [output.meta["val"]]
    op.meta[RECOMPUTED] = True
    fresh.meta[REPEATS] = output.name
    mark_backward(op)
    mark_backward(fresh)
    return fresh


def mark_backward(node: fx.Node) -> None:
    node.meta["recompute"] = torch.utils.checkpoint.CheckpointPolicy.MUST_RECOMPUTE
    # AOTAutograd's own mark, which the partitioner believes before it looks at what a node depends on.
    node.meta["partitioner_tag"] = "is_backward"
