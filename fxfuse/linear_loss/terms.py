"""Logits that are a sum, ``x W' + b + s (h B') + ...``: a linear and products over a few columns that are added to it.

An adapter on the output head makes one, h being ``x A'``. products/ has written such a sum as ``addmm``; here it is read off the graph.
A chunk of its rows is the same sum over a chunk of x and of h, and the gradients of h and B come from the gradient of the logits by the
same transposes as those of x and W. The rest of an adapter (A, dropout) stands before the head, and is autograd's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ..canonical.facts import known_dtype, known_shape, same_size, static_size, tensor_of
from ..canonical.vocabulary import CAST, aten
from .products import LINEARS

_SUMS = (torch.addmm, aten.addmm.default)


@dataclass(frozen=True)
class Term:
    """``factor * left right'``, left [..., R], right [classes, R]; ``wide``: in float32, beside bfloat16 logits."""

    left: fx.Node
    right: fx.Node
    factor: float
    wide: bool = False


@dataclass(frozen=True)
class Logits:
    """linear: [..., classes]        terms: what is added to it, in order        between: the nodes from the linear to the sum"""

    linear: fx.Node
    terms: tuple[Term, ...] = ()
    between: tuple[fx.Node, ...] = ()


def read_logits(node: fx.Node) -> Logits | None:
    """The linear whose result a node is, perhaps with terms added; None where it is neither."""
    terms: list[Term] = []
    between: list[fx.Node] = []
    while node.op == "call_function" and tensor_of(node) is not None:
        if node.target in LINEARS:
            return Logits(node, tuple(terms[::-1]), tuple(between))
        step = _step(node)
        if step is None:
            return None
        node, term, nodes = step
        terms.append(term)
        between += nodes
    return None


def _step(node: fx.Node) -> tuple[fx.Node, Term, list[fx.Node]] | None:
    """(what a term is added to, the term, the nodes that do it): ``addmm`` of matrices, or of reshaped ones and back; a wide one
    between a cast to float32 and a cast back."""
    nodes = [node]

    def below(operand: object) -> fx.Node | None:
        """An operand that only this sum reads; it is one of the sum's nodes."""
        if not isinstance(operand, fx.Node) or operand.op != "call_function" or len(operand.users) != 1:
            return None
        nodes.append(operand)
        return operand

    wide = node.target is CAST
    total = below(node.args[0]) if wide else node
    shaped = total is not None and total.target is aten.view_as.default
    like = total.args[1] if total is not None and shaped else None
    total = below(total.args[0]) if total is not None and shaped else total
    if total is None or total.target not in _SUMS or len(total.args) != 3 or set(total.kwargs) - {"alpha"}:
        return None
    matrix, left, across = total.args
    factor = total.kwargs.get("alpha", 1.0)
    if not isinstance(left, fx.Node) or not isinstance(across, fx.Node) or not isinstance(factor, int | float):
        return None
    for _ in range(shaped + wide):  # flattened and widened, in any order
        matrix = below(matrix)
        matrix = None if matrix is None else _flattened(matrix) if matrix.target is aten.reshape.default else _widened(matrix)
    left = _flattened(left) or left if shaped else left
    if not isinstance(matrix, fx.Node) or (shaped and matrix is not like) or across.target is not aten.t.default:
        return None
    right = across.args[0]
    if not isinstance(right, fx.Node) or not _fit(node, matrix, left, right) or (wide and not _is_wide(left, right, matrix)):
        return None
    return matrix, Term(left, right, float(factor), wide), nodes


def _flattened(node: fx.Node) -> fx.Node | None:
    """What a node is all rows of."""
    if node.target is not aten.reshape.default or len(known_shape(node)) != 2:
        return None
    return node.args[0] if isinstance(node.args[0], fx.Node) else None


def _widened(node: fx.Node) -> fx.Node | None:
    """What a node is a cast of."""
    return node.args[0] if node.target is CAST and isinstance(node.args[0], fx.Node) else None


def _is_wide(left: fx.Node, right: fx.Node, matrix: fx.Node) -> bool:
    """Are these float32 factors beside bfloat16 logits; products/calls.py multiplies such in bfloat16 parts."""
    return known_dtype(left) == known_dtype(right) == torch.float32 and known_dtype(matrix) == torch.bfloat16


def _fit(total: fx.Node, matrix: fx.Node, left: fx.Node, right: fx.Node) -> bool:
    """Has the left factor the rows of what the term is added to, which keeps its dtype. (Other dtypes autocast makes one.)"""
    rows, others = known_shape(matrix)[:-1], known_shape(left)[:-1]
    return (
        known_dtype(total) == known_dtype(matrix)
        and len(rows) == len(others) and all(same_size(a, b) for a, b in zip(rows, others, strict=True))
        and len(known_shape(right)) == 2 and static_size(known_shape(right)[1]) is not None
    )
