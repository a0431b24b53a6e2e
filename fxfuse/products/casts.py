"""Widening casts that are taken back: ``bf16 -> fp32 -> bf16`` is nothing, in the forward and in the backward that follows from it.

Adapters kept in float32 make such pairs: their library casts x to the adapter's dtype, and autocast casts it back at the matmul. The
copy would be made and, as the matmul's operand, kept. Leaving the pair out is exact: no value between them was rounded.
"""

from __future__ import annotations

from torch import fx

from ..canonical.facts import dtype_of
from ..canonical.vocabulary import CAST
from .expression import argument, is_linear, widening


def cancel_casts(graph: fx.Graph) -> int:
    """In place; returns how many casts were left out."""
    count = 0
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is CAST and widening(node.args[0]) and dtype_of(node) == dtype_of(node.args[0].args[0]):
            node.replace_all_uses_with(node.args[0].args[0])
            count += 1
        elif is_linear(node):
            # A result narrower than the operand: autocast computes this matmul in the result's dtype.
            operand = argument(node, 0, "input")
            if widening(operand) and dtype_of(node) == dtype_of(operand.args[0]):
                node.replace_input_with(operand, operand.args[0])
                count += 1
    return count
