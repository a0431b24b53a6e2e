"""Tags that tell AOTAutograd's partitioner what to save: what eager would, except where the plan recomputes.

Left to itself, the partitioner assumes that a compiler will fuse what it recomputes, and recomputes chains of ops that
nobody fuses here. So every node of the forward is tagged, and the partitioner only carries the tags out.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from ..quantized_op import is_dequantization
from .joint import base_of, forward_nodes, is_view


def tag_dequantized(joint: fx.GraphModule) -> None:
    """A dequantized weight is never saved: it is four times what it is made of, which lives anyway."""
    for node in joint.graph.nodes:
        if is_dequantization(node):
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE


def tag_as_eager(joint: fx.GraphModule, num_fwd_outputs: int) -> None:
    """Forward values that the backward reads are saved. Three kinds of node are left to the partitioner or the user:

    - what carries a tag already: the user's own checkpointing;
    - views, which cost nothing either way, so that memory is not counted twice;
    - a widening cast of a value that is kept anyway: its saved copy would hold nothing new.
    """
    forward = forward_nodes(joint.graph, num_fwd_outputs)
    for node in joint.graph.nodes:
        if node not in forward or node.op != "call_function" or "recompute" in node.meta or is_view(node):
            continue
        if _holds_nothing_new(node, forward):
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        else:
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def _holds_nothing_new(node: fx.Node, forward: set[fx.Node]) -> bool:
    """Is this a wider copy of a value that the backward has in any case."""
    if node.target is not torch.ops.aten._to_copy.default or not isinstance(node.args[0], fx.Node):
        return False
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or before.device != after.device or before.dtype == torch.bool:
        return False
    if not before.dtype.is_floating_point or before.element_size() >= after.element_size():
        return False
    if all(user in forward for user in node.users):
        return False
    base = base_of(node.args[0])
    return base.op == "placeholder" or any(user not in forward for user in base.users)
