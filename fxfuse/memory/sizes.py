"""Numbers for the symbolic sizes of a graph: those of the call that it was compiled for, or of another one."""

from __future__ import annotations

from collections.abc import Mapping

import sympy
import torch
from torch import Tensor, fx


class Sizes:
    """Sizes and bytes of a graph's values at given values of its symbols.

    ``values``: of each symbol; one that is missing has the value that it was compiled for.
    """

    def __init__(self, values: Mapping[sympy.Symbol, int] | None = None) -> None:
        self.values = dict(values or {})
        self._known: dict[sympy.Expr, int] = {}

    def number(self, size: int | torch.SymInt) -> int:
        """An int for a size. A size that only the data tells counts as one."""
        if isinstance(size, int):
            return size
        expr = size.node.expr
        if expr not in self._known:
            if expr.free_symbols <= set(self.values):
                self._known[expr] = int(expr.xreplace(self.values))
            else:
                self._known[expr] = size.node.hint or 1
        return self._known[expr]

    def shape(self, value: Tensor) -> tuple[int, ...]:
        return tuple(map(self.number, value.shape))

    def elements(self, value: Tensor) -> int:
        count = 1
        for size in value.shape:
            count *= self.number(size)
        return count

    def bytes(self, value: object) -> int:
        """Bytes of a tensor laid out without gaps; of several, together; 0 for anything else."""
        if isinstance(value, Tensor):
            return self.elements(value) * value.element_size()
        return sum(map(self.bytes, value)) if isinstance(value, (tuple, list)) else 0


def compiled_for(graph: fx.Graph) -> dict[sympy.Symbol, int]:
    """The symbols that are sizes of the graph's inputs, with the values that they were compiled for."""
    found: dict[sympy.Symbol, int] = {}
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        for size in value.shape if isinstance(value, Tensor) else (value,):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol and size.node.hint is not None:
                found.setdefault(size.node.expr, size.node.hint)
    return found


def is_symbolic(value: object) -> bool:
    """Has a tensor a size that differs from call to call."""
    return isinstance(value, Tensor) and any(isinstance(size, torch.SymInt) for size in value.shape)
