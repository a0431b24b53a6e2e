"""Reading sums of products in a canonical (Dynamo) graph: ``c + s * linear(h, B)`` through casts and factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ..canonical.facts import dtype_of, is_plain, known_shape, shape_of, static_size, tensor_of
from ..canonical.vocabulary import CAST

aten = torch.ops.aten

LINEARS = (F.linear, aten.linear.default)
# Products other than linears, which a thin term may be added to.
_MATMULS = (torch.addmm, torch.mm, torch.matmul, aten.addmm.default, aten.mm.default, aten.matmul.default)
_LOOKED_THROUGH = (aten.reshape.default, aten.view_as.default, aten.view.default, aten.clone.default, CAST)
# A term is thin when its contraction is at most this part of its columns: then the sum costs as much as the product.
THIN = 4


@dataclass(frozen=True)
class ThinTerm:
    """``factor * linear(left, weight)``, left [..., R], weight [N, R], R small; ``between``: the casts and factors on its way."""

    product: fx.Node
    factor: float
    between: tuple[fx.Node, ...]

    @property
    def left(self) -> fx.Node:
        return argument(self.product, 0, "input")

    @property
    def weight(self) -> fx.Node:
        return argument(self.product, 1, "weight")

    @property
    def sizes(self) -> tuple[int, int]:
        """Columns N and contraction R."""
        columns, contraction = (static_size(size) for size in known_shape(self.weight))
        assert columns is not None
        assert contraction is not None
        return columns, contraction

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        return (*self.between, self.product)


def argument(node: fx.Node, position: int, name: str) -> Any:
    """An argument of a call, given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def is_linear(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in LINEARS


def read_thin_term(operand: Any) -> ThinTerm | None:
    """The operand of a sum as a factor times a product over a short contraction, or None. Nothing else may read what lies between."""
    factor = 1.0
    between: list[fx.Node] = []
    node = operand
    while isinstance(node, fx.Node) and node.op == "call_function" and len(node.users) == 1:
        if is_linear(node):
            return _thin(node, factor, tuple(between))
        scaled = _factor_of(node)
        if scaled is None and node.target is not CAST:
            return None
        factor *= 1.0 if scaled is None else scaled
        between.append(node)
        node = node.args[0]
    return None


def _factor_of(node: fx.Node) -> float | None:
    if node.target not in (aten.mul.Tensor, aten.div.Tensor) or len(node.args) != 2 or node.kwargs:
        return None
    number = node.args[1]
    if isinstance(number, bool) or not isinstance(number, int | float) or (node.target is aten.div.Tensor and number == 0):
        return None
    return float(number) if node.target is aten.mul.Tensor else 1.0 / number


def _thin(node: fx.Node, factor: float, between: tuple[fx.Node, ...]) -> ThinTerm | None:
    left, weight, bias = (argument(node, i, name) for i, name in enumerate(("input", "weight", "bias")))
    tensors = [tensor_of(left), tensor_of(weight)]
    if bias is not None or any(t is None or not is_plain(t) for t in tensors) or len(known_shape(weight)) != 2:
        return None
    columns, contraction = (static_size(size) for size in known_shape(weight))
    if columns is None or contraction is None or contraction * THIN > columns:
        return None
    return ThinTerm(node, factor, between)


def is_wide_product(node: Any) -> bool:
    """Is this the result of a matmul (perhaps inside a function of its own, as of quantized weights), seen through views and copies."""
    while isinstance(node, fx.Node) and node.op == "call_function" and node.target in _LOOKED_THROUGH:
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    return is_linear(node) or node.target in _MATMULS or getattr(node.target, "_name", "") == "autograd_function_apply"


def is_low_rank(term: ThinTerm) -> bool:
    """Is the term the second half of ``(x A') B'``: its left factor is itself a product, of a longer contraction."""
    node = term.left
    while isinstance(node, fx.Node) and node.op == "call_function" and (node.target is CAST or node.target is F.dropout):
        node = node.args[0]
    if not is_linear(node):
        return False
    shape = shape_of(argument(node, 1, "weight"))
    return shape is not None and len(shape) == 2 and (static_size(shape[1]) or 0) > term.sizes[1]


def widening(node: Any) -> bool:
    """Is this a cast of a 16-bit tensor to a wider dtype."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or node.target is not CAST:
        return False
    before, after = dtype_of(node.args[0]), dtype_of(node)
    return before is not None and after is not None and before.is_floating_point and before.itemsize == 2 < after.itemsize
