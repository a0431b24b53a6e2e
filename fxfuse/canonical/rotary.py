"""Complex rotations as real arithmetic over the even and odd columns.

    view_as_real(view_as_complex(pairs(x)) * (cos + i sin)) = stack(even cos - odd sin, even sin + odd cos)
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from .builder import Builder, Leave
from .facts import same_size, same_sizes, tensor_of
from .views import END
from .vocabulary import ARITHMETIC, aten, spelling

_PRODUCTS = (operator.mul, torch.mul, "mul", aten.mul.Tensor)
_TO_COMPLEX = (torch.view_as_complex, aten.view_as_complex.default)


@spelling("view_as_real")
def view_as_real(b: Builder, input: Node) -> Node:
    """The result of a rotation by a complex factor that is not trained."""
    rotated, factor = _rotation(input)
    even, odd = _pairs(b, rotated)
    parts = b.call(torch.view_as_real, factor)
    cos, sin = (b.call(aten.select.int, parts, -1, i) for i in (0, 1))
    mul = ARITHMETIC["mul"]
    real = b.call(ARITHMETIC["sub"], b.call(mul, even, cos), b.call(mul, odd, sin))
    imaginary = b.call(ARITHMETIC["add"], b.call(mul, even, sin), b.call(mul, odd, cos))
    return b.finish(aten.stack.default, [real, imaginary], -1)


def _rotation(product: Node) -> tuple[Node, Node]:
    """(the pairs that are rotated, the complex factor) of a product of complex tensors."""
    if product.op not in ("call_function", "call_method") or product.target not in _PRODUCTS or len(product.args) != 2:
        raise Leave("not a rotation")
    for x, factor in (product.args, product.args[::-1]):
        if isinstance(x, Node) and x.target in _TO_COMPLEX and (tensor := tensor_of(factor)) is not None and tensor.is_complex():
            return x.args[0], factor
    raise Leave("not a rotation")


def _pairs(b: Builder, pairs: Node) -> tuple[Node, Node]:
    """Even and odd columns of the tensor that ``pairs`` [..., n, 2] reshapes, [..., 2 n], or else of ``pairs`` itself."""
    shape = b.tensor(pairs).shape
    if pairs.target is aten.reshape.default:
        x = pairs.args[0]
        whole = b.tensor(x).shape
        if same_sizes(whole[:-1], shape[:-2]) and same_size(whole[-1], 2 * shape[-2]):
            end = whole[-1] if isinstance(whole[-1], int) else END
            return b.call(aten.slice.Tensor, x, -1, 0, end, 2), b.call(aten.slice.Tensor, x, -1, 1, end, 2)
    return b.call(aten.select.int, pairs, -1, 0), b.call(aten.select.int, pairs, -1, 1)
