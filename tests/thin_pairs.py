"""Both thin products of one matrix, for tests: operands, and how near to float64 results are."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fxfuse.products.calls import two_products
from fxfuse.validation import error_ratio


class Operands(NamedTuple):
    """Of a pair, in the order of its calls."""

    matrix: Tensor
    right: Tensor
    left: Tensor
    across: Tensor
    down: Tensor


def worst(o: Operands, alpha: float, beta: float) -> float:
    """The larger error ratio of the two results, against float64, in units of the library's own error. The library's replace them."""
    ours = [o.across.clone(), o.down.clone()]
    two_products(*o, alpha, beta)
    exact = [alpha * o.matrix.double() @ o.right.double(), beta * o.matrix.double().t() @ o.left.double()]
    return max(error_ratio(*three) for three in zip(ours, [o.across, o.down], exact, strict=True))
