"""Factors ride in the matmul that they multiply: ``s * (a b)`` is one call, rounded once."""

from __future__ import annotations

import torch
from torch import fx

from .calls import product
from .terms import made, read_product, tensor

aten = torch.ops.aten


def fold_factors(graph: fx.Graph) -> int:
    """``mul(mm(a, b), number)`` becomes ``product(a, b, number)``, where nothing else reads the matmul. Returns how many."""
    count = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in (aten.mul.Scalar, aten.mul.Tensor) or len(node.args) != 2:
            continue
        term, number = read_product(node.args[0]), node.args[1]
        if term is None or len(term.node.users) != 1 or isinstance(number, bool) or not isinstance(number, int | float):
            continue
        if tensor(node).dtype != tensor(term.node).dtype:
            continue
        with graph.inserting_before(node):
            scaled = made(product, (term.left, term.right, term.alpha * number), tensor(node), node)
        node.replace_all_uses_with(scaled)
        graph.erase_node(node)
        graph.erase_node(term.node)
        count += 1
    return count
