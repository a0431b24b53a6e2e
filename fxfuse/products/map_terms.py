"""Low-rank terms of what a map reads: ``x W' + s h B'``, where the product with W is a matmul of its own and nothing else reads the sum
before the map does. The map adds the term to what it loads; if somebody keeps the sum, the map stores it, where the product lay.

Without that the term is written, and read again by the matmul that is added to it: twice the bytes of the sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..lowering import INTERPRETED
from ..program import Lane, Output, Program
from .accumulation import unviewed
from .calls import accumulate, product
from .terms import RESHAPES, is_tensor, made, size, tensor

aten = torch.ops.aten
MOST_RANK = 32
LEAST_BYTES = 8 * 2**20  # of the sum; below, launches count, and not bytes


@dataclass(frozen=True)
class Term:
    """Operand number ``index`` of an op, ``operand``, is a view of ``total`` = wide matmul + alpha * left [M, R] @ right [R, N]."""

    index: int
    operand: fx.Node
    total: fx.Node
    left: fx.Node
    right: fx.Node
    alpha: float

    def bare(self) -> fx.Node:
        """The operand without the term, in new nodes."""
        graph = self.total.graph
        with graph.inserting_before(self.total):
            node = made(aten.mm.default, self.total.args[1:3], tensor(self.total), self.total)
        if self.operand is self.total:
            return node
        with graph.inserting_before(self.operand):
            return made(self.operand.target, (node, *self.operand.args[1:]), tensor(self.operand), self.operand)


def terms(op: fx.Node) -> Iterator[Term]:
    """Of a fused op of an arranged graph."""
    operands: Any = op.args[0]
    for index, operand in enumerate(operands):
        total = unviewed(operand)
        if total.target is not accumulate or total.args[3] != 1.0 or operands.count(operand) > 1:
            continue
        first = total.args[0]
        direct = operand is total or (operand.target in RESHAPES and operand.args[0] is total and len(total.users) == 1)
        if direct and isinstance(first, fx.Node) and first.target is product and len(first.users) == 1:
            left, right, alpha = first.args
            rank = size(left, 1)  # type: ignore[arg-type]
            if rank is not None and rank <= MOST_RANK and tensor(total).dtype.itemsize == 2:
                yield Term(index, operand, total, left, right, alpha)  # type: ignore[arg-type]


def large(operand: Any) -> bool:
    """Is this, as far as the example tells, a matrix worth the trouble, on a device with tensor cores."""
    if not is_tensor(operand) or not (INTERPRETED or tensor(operand).is_cuda):
        return False
    from ..kernels.abilities import of_device  # Triton is there

    value = tensor(operand)
    count = value.itemsize
    for length in value.shape:
        count *= length if isinstance(length, int) else length.node.hint or 1
    return INTERPRETED or (torch.cuda.is_available() and of_device(value.device).pairs and count >= LEAST_BYTES)


def sum_name(program: Program, index: int) -> str:
    """Of the output that an argument is, with its term."""
    return f"sum_{program.arguments[index].name}"


def with_sums(program: Program, indices: Sequence[int]) -> Program:
    """The program with some of its arguments among its outputs, as they are loaded."""
    (axis, _), = program.axes
    arguments = [program.arguments[index] for index in indices]
    return replace(program, outputs=(*program.outputs, *(
        Output(f"sum_{a.name}", a.dtype, a.rows, a.columns, ((program.loads(a.name)[0], Lane(axis)),)) for a in arguments)))
