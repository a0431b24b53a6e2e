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
from ..canonical.vocabulary import aten
from .products import LINEARS

_SUMS = (torch.addmm, aten.addmm.default)


@dataclass(frozen=True)
class Term:
    """``factor * left right'``, left [..., R], right [classes, R]."""

    left: fx.Node
    right: fx.Node
    factor: float


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
    """(what a term is added to, the term, the nodes that do it): ``addmm`` of matrices, or of reshaped ones and back."""
    total, shaped = node, node.target is aten.view_as.default
    if shaped:
        if not isinstance(node.args[0], fx.Node) or len(node.args[0].users) != 1:
            return None
        total = node.args[0]
    if total.op != "call_function" or total.target not in _SUMS or len(total.args) != 3 or set(total.kwargs) - {"alpha"}:
        return None
    matrix, thin, across = total.args
    factor = total.kwargs.get("alpha", 1.0)
    if not all(isinstance(n, fx.Node) for n in (matrix, thin, across)) or not isinstance(factor, int | float):
        return None
    nodes = [node, total] if shaped else [node]
    if shaped:
        if not _flattened(matrix) or matrix.args[0] is not node.args[1]:  # type: ignore[union-attr]
            return None
        nodes.append(matrix)  # type: ignore[arg-type]
        matrix = matrix.args[0]  # type: ignore[union-attr]
    left = thin.args[0] if shaped and _flattened(thin) else thin  # type: ignore[union-attr, arg-type]
    right = across.args[0] if across.target is aten.t.default else None  # type: ignore[union-attr]
    if right is None or known_dtype(total) != known_dtype(matrix) or not _fit(matrix, left, right):  # type: ignore[arg-type]
        return None
    return matrix, Term(left, right, float(factor)), nodes  # type: ignore[return-value, arg-type]


def _flattened(node: fx.Node) -> bool:
    return node.target is aten.reshape.default and isinstance(node.args[0], fx.Node) and len(known_shape(node)) == 2


def _fit(matrix: fx.Node, left: fx.Node, right: fx.Node) -> bool:
    """Has the left factor the rows of what the term is added to. (Where dtypes differ, autocast makes them one.)"""
    rows, others = known_shape(matrix)[:-1], known_shape(left)[:-1]
    return (
        len(rows) == len(others) and all(same_size(a, b) for a, b in zip(rows, others, strict=True))
        and len(known_shape(right)) == 2 and static_size(known_shape(right)[1]) is not None
    )
