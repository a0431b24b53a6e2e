"""The casts that autocast makes of activations are written down, so that the row program that made one stores it in 16 bits.

A matmul under autocast takes float32 operands and casts them unseen: the graph has no node for it, and a norm or a gate in front of it
would store float32 for a cast to read. Weights are left to autocast (it casts each once and remembers it), and so is everything
that has no rows. Exact: each reader has a cast of its own, as autocast gives it, so gradients are added in float32 as before.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch.fx import GraphModule, Node

from .builder import Builder, Leave
from .facts import dtype_of, tensor_of
from .vocabulary import aten

_LINEARS = (F.linear, aten.linear.default)
_OPERANDS = {**dict.fromkeys(_LINEARS, 1), F.scaled_dot_product_attention: 3, aten.scaled_dot_product_attention.default: 3}


def write_operand_casts(gm: GraphModule) -> int:
    """In place; returns how many casts were written. A float32 operand beside a 16-bit result is what tells of autocast."""
    builder, count = Builder(gm), 0
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target not in _OPERANDS or dtype_of(node) is None:
            continue
        for position in range(min(_OPERANDS[node.target], len(node.args))):
            operand = node.args[position]
            if isinstance(operand, Node) and _is_cast_unseen(operand, node):
                builder.at(node)
                try:
                    node.update_arg(position, builder.cast(operand, dtype_of(node)))  # type: ignore[arg-type]
                except Leave:
                    builder.discard()
                    continue
                count += 1
    return count


def _is_cast_unseen(operand: Node, node: Node) -> bool:
    """Does autocast narrow this value for the node; and is it one that this graph computes."""
    tensor, dtype = tensor_of(operand), dtype_of(node)
    return (tensor is not None and dtype is not None and tensor.is_floating_point() and operand.op == "call_function"
            and dtype.is_floating_point and dtype.itemsize == 2 < tensor.dtype.itemsize)
