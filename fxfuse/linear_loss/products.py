"""The matrix products of a linear and of its derivatives, from one line of Einstein notation.

    logits = hidden weight'           "nd,vd->nv"
    d hidden = G weight               "nv,vd->nd"       G: the gradient of the logits
    d weight = G' hidden              "nv,nd->vd"

The transpose of a product for one operand is the product of the cotangent with the other operand, with the letters in that
operand's order. cuBLAS runs them all; a sum over chunks of rows is added up in the accumulator's dtype, inside the product.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

# Targets of the graph nodes that are one.
LINEARS = (F.linear, torch.ops.aten.linear.default)
LINEAR = "nd,vd->nv"
HALF = (torch.float16, torch.bfloat16)


def left_name(k: int) -> str:
    """What the left factor of the k-th term that is added to the linear is called among the operands."""
    return f"left{k}"


def right_name(k: int) -> str:
    """And its right factor."""
    return f"right{k}"


def transpose(product: str, operand: int) -> str:
    """The product that gives the gradient of an operand from (cotangent, other operand)."""
    operands, result = product.split("->")
    letters = operands.split(",")
    return f"{result},{letters[1 - operand]}->{letters[operand]}"


def multiply(product: str, a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out = product(a, b)``, in the operands' dtype."""
    torch.mm(*_oriented(product, a, b), out=out)


def add_multiple(product: str, a: Tensor, b: Tensor, factor: float, out: Tensor, first: bool) -> None:
    """``out += factor * product(a, b)``, rounded once; ``out = ...`` if it is the first."""
    torch.addmm(out, *_oriented(product, a, b), beta=0 if first else 1, alpha=factor, out=out)


def accumulate(product: str, a: Tensor, b: Tensor, into: Tensor, first: bool) -> None:
    """``into = product(a, b)`` the first time, ``into += product(a, b)`` from then on; ``into`` is at least as wide as a and b."""
    left, right = _oriented(product, a, b)
    if into.dtype != a.dtype and not a.is_cuda:
        left, right = left.to(into.dtype), right.to(into.dtype)
    if into.dtype == left.dtype:
        torch.mm(left, right, out=into) if first else into.addmm_(left, right)
    elif first:
        torch.ops.aten.mm.dtype_out(left, right, into.dtype, out=into)
    elif adds_to_wider(left.dtype, into.device):
        torch.ops.aten.addmm.dtype_out(into, left, right, into.dtype, out=into)
    else:
        for rows in range(0, len(into), PART):
            part = into[rows : rows + PART]
            part += torch.ops.aten.mm.dtype(left[rows : rows + PART], right, into.dtype)


def multiply_counted(product: str, a: Tensor, b: Tensor, count: Tensor) -> Tensor:
    """``product(a, b)`` for the first ``count`` rows of a; what lies in the rows after them is undefined.

    count: int32 [1] on the device, which nobody waits for
    """
    left, right = _oriented(product, a, b)
    return torch._grouped_mm(left, right.unsqueeze(0), offs=count)


def sum_counted(product: str, a: Tensor, b: Tensor, count: Tensor) -> Tensor:
    """``product(a, b)`` over the first ``count`` rows of a and b, which are what is summed. Row 0 is always among them."""
    left, right = _oriented(product, a, b)
    return torch._grouped_mm(left, right, offs=count.clamp(min=1))[0]


def accumulate_counted(product: str, a: Tensor, b: Tensor, count: Tensor, into: Tensor, first: bool) -> None:
    """``accumulate`` of a ``sum_counted``, which has no wider result than a and b: so in parts, each rounded once."""
    for start in range(0, len(into), COUNTED_PART):
        found = sum_counted(product, a[:, start : start + COUNTED_PART], b, count)
        target = into[start : start + COUNTED_PART]
        target.copy_(found) if first else target.add_(found)


def groups_on_device(hidden: Tensor, weight: Tensor) -> bool:
    """Are there grouped products of these matrices whose ends stay on the device. (torch has others, which fetch them.)"""
    return (
        hidden.is_cuda and torch.version.hip is None and hasattr(torch, "_grouped_mm")
        and hidden.dtype == weight.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(hidden.device)[0] in (9, 10)
        and weight.stride(1) == 1 and weight.data_ptr() % 16 == 0
        and all(size * weight.element_size() % 16 == 0 for size in (weight.stride(0), hidden.shape[1]))
    )


# Rows of a wider sum that a grouped product, which has no wide result, is computed for at a time.
COUNTED_PART = 16384
# Rows of the result that are computed apart from what they are added to, where torch cannot add them up itself.
PART = 4096


@cache
def adds_to_wider(dtype: torch.dtype, device: torch.device) -> bool:
    """Can this torch add a product of 16-bit matrices to a float32 matrix in place (early ones of ``out_dtype`` could not)."""
    small, wide = torch.ones(16, 16, dtype=dtype, device=device), torch.zeros(16, 16, device=device)
    try:
        torch.ops.aten.addmm.dtype_out(wide, small, small, wide.dtype, out=wide)
    except RuntimeError:
        return False
    return True


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a sum over chunks is kept in: 16 bits would lose what each chunk adds."""
    return torch.float32 if dtype in HALF else dtype


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a gradient of a parameter that is not yet divided by the number of rows is kept in: float16 could not hold it."""
    return torch.float32 if dtype == torch.float16 else dtype


def _oriented(product: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The operands as ``torch.mm`` takes them: (rows of the result, summed) and (summed, columns of the result)."""
    operands, result = product.split("->")
    first, second = operands.split(",")
    return (a if first[0] == result[0] else a.t()), (b if second[1] == result[1] else b.t())
