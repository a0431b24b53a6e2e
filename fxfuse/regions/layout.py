"""How a node's dimensions lie in its region's domain.

A region's domain is a list of leading dimensions (rows) and the columns. A transpose between a norm and a rotation permutes the
rows; an ``unsqueeze`` inserts a dimension of size 1; none of them moves data, so none ends a region.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..canonical.facts import known_shape, statically_one, tensor_inputs
from .operations import (
    CONCATENATIONS,
    CROSS_ENTROPY,
    GATHER,
    PERMUTE,
    POINTWISE,
    REDUCTIONS,
    RESHAPE,
    ROW_MACROS,
    SLICE,
    SQUEEZE,
    STACK,
    UNSQUEEZE,
)


@dataclass(frozen=True)
class Layout:
    """``dims[i]`` is the domain dimension of the node's i-th leading dimension, or None where that has size 1 and is broadcast.

    ``column``: the node's last dimension is the column dimension (of size 1 for a row statistic with keepdim).
    ``paired``: a further last dimension of size 2 follows (the stacked halves of an interleaved rotation, before its flatten).
    """

    dims: tuple[int | None, ...]
    column: bool = True
    paired: bool = False

    @property
    def covered(self) -> frozenset[int]:
        return frozenset(d for d in self.dims if d is not None)


def starting_layout(node: fx.Node) -> Layout | None:
    """The layout of a node that opens a region: its own dimensions are the domain (a loss's are its logits')."""
    if node.target is CROSS_ENTROPY:
        return Layout((0,))
    rank = len(known_shape(node))
    if node.target in REDUCTIONS:
        return Layout(tuple(range(rank - 1)), True) if keeps_dim(node) else Layout(tuple(range(rank)), False)
    if node.target is STACK:
        return Layout(tuple(range(rank - 2)), True, True)
    if node.target in (PERMUTE, UNSQUEEZE, SQUEEZE, RESHAPE) or rank == 0:
        return None
    return Layout(tuple(range(rank - 1)), True)


def keeps_dim(node: fx.Node) -> bool:
    """Has a reduction a last dimension of size 1 (an element that is gathered has the one of its index)."""
    if node.target is GATHER:
        return True
    return bool(node.args[-1]) if isinstance(node.args[-1], bool) else False


def propagate(node: fx.Node, known: Mapping[fx.Node, Layout]) -> Layout | None:
    """The layout of ``node`` given those of operands in one region, or None when it leaves the domain (and so the region)."""
    target = node.target
    source = node.args[0] if node.args else None
    layout = known.get(source) if isinstance(source, fx.Node) else None
    if target is PERMUTE:
        return None if layout is None else _permuted(layout, node.args[1])
    if target is UNSQUEEZE:
        return None if layout is None else _unsqueezed(node, layout)
    if target is SQUEEZE:
        return None if layout is None else _squeezed(node, layout)
    if target is RESHAPE:
        return None if layout is None else _reshaped(node, source, layout)
    if target in REDUCTIONS:
        if layout is None or not layout.column or layout.paired:
            return None
        return layout if keeps_dim(node) else Layout(layout.dims, False)
    if target is SLICE or target in ROW_MACROS:
        return layout if layout is not None and layout.column and not layout.paired else None
    if target in CONCATENATIONS or target is STACK or target in POINTWISE:
        joined = _broadcast(node, known)
        if target is STACK and joined is not None:
            return Layout(joined.dims, True, True) if joined.column else None
        return None if joined is not None and target in CONCATENATIONS and not joined.column else joined
    return None


def operand_layout(node: fx.Node, layout: Layout, operand: fx.Node) -> Layout:
    """The layout that ``node`` (of known layout) gives to an operand that is computed elsewhere."""
    shape = known_shape(operand)
    if node.target is STACK:
        return Layout(layout.dims, True)
    if node.target in REDUCTIONS:
        return Layout(layout.dims, True)
    if node.target in ROW_MACROS and operand is not node.args[0]:
        return _macro_operand(node, layout, operand)
    leading = shape[:-1] if layout.column else shape
    if layout.column and len(shape) == 0:
        return Layout((), False)
    dims = layout.dims[len(layout.dims) - len(leading) :] if leading else ()
    own = tuple(
        None if statically_one(size) and not _one_in_domain(node, layout, i - len(leading)) else dim
        for i, (size, dim) in enumerate(zip(leading, dims, strict=True))
    )
    return Layout(own, layout.column)


def _one_in_domain(node: fx.Node, layout: Layout, position: int) -> bool:
    """Is the node's own dimension (counted from the end of its leading ones) of size 1 too."""
    shape = known_shape(node)
    leading = shape[:-1] if layout.column and node.target not in REDUCTIONS else shape
    return len(leading) >= -position and statically_one(leading[position])


def _macro_operand(node: fx.Node, layout: Layout, operand: fx.Node) -> Layout:
    """Weights of norms are column operands; a loss's labels are row operands without columns."""
    if len(known_shape(operand)) == 1 and operand is not (node.args[1] if len(node.args) > 1 else None):
        return Layout((), True)
    return Layout(layout.dims, False)


def _broadcast(node: fx.Node, known: Mapping[fx.Node, Layout]) -> Layout | None:
    shape = known_shape(node)
    members = [(known[o], known_shape(o)) for o in tensor_inputs(node) if o in known]
    if not members or any(layout.paired for layout, _ in members):
        return None
    column = any(layout.column for layout, _ in members)
    rank = len(shape) - column - (node.target is STACK)
    dims: list[int | None] = [None] * rank
    for layout, operand_shape in members:
        if layout.column != column and len(operand_shape) > 0:
            return None
        offset = rank - len(layout.dims)
        if offset < 0:
            return None
        for i, dim in enumerate(layout.dims):
            grows = statically_one(operand_shape[i]) and not statically_one(shape[offset + i])
            if dim is not None and not grows:
                if dims[offset + i] not in (None, dim):
                    return None
                dims[offset + i] = dim
    unresolved = any(dim is None and not statically_one(shape[i]) for i, dim in enumerate(dims))
    repeated = len({d for d in dims if d is not None}) != sum(d is not None for d in dims)
    return None if unresolved or repeated else Layout(tuple(dims), column)


def _permuted(layout: Layout, order: Any) -> Layout | None:
    rank = len(layout.dims)
    order = [int(d) for d in order]
    if layout.paired or (layout.column and order[-1] != rank):
        return None
    return Layout(tuple(layout.dims[d] for d in order[:rank]), layout.column)


def _unsqueezed(node: fx.Node, layout: Layout) -> Layout | None:
    rank = len(known_shape(node))
    at = int(node.args[1]) % rank
    if layout.paired:
        return None
    if not layout.column and at == rank - 1:
        return Layout(layout.dims, True)
    if at > len(layout.dims):
        return None
    return Layout((*layout.dims[:at], None, *layout.dims[at:]), layout.column)


def _squeezed(node: fx.Node, layout: Layout) -> Layout | None:
    at = int(node.args[1]) % len(known_shape(node.args[0]))
    if layout.paired:
        return None
    if layout.column and at == len(layout.dims):
        return Layout(layout.dims, False) if statically_one(known_shape(node.args[0])[-1]) else None
    if layout.dims[at] is not None and not statically_one(known_shape(node.args[0])[at]):
        return None
    return Layout((*layout.dims[:at], *layout.dims[at + 1 :]), layout.column)


def _reshaped(node: fx.Node, source: fx.Node, layout: Layout) -> Layout | None:
    """Only the flatten of stacked pairs keeps to the domain."""
    before, after = known_shape(source), known_shape(node)
    if layout.paired and len(after) == len(before) - 1 and not statically_one(before[-2]):
        return Layout(layout.dims, True)
    return None
