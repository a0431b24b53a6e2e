"""What the arranged graphs call: matmuls that write where they are told. Functions of tensors, for generated code.

Those that write into a tensor also return it, so that whoever reads it next depends on them in the graph.
"""

from __future__ import annotations

import torch
from torch import Tensor


def product(left: Tensor, right: Tensor, alpha: float) -> Tensor:
    """alpha * left [M, K] @ right [K, N], the factor inside the matmul: rounded once."""
    result = left.new_empty((left.shape[0], right.shape[1]))
    return torch.addmm(result, left, right, beta=0, alpha=alpha, out=result)


def columns(buffer: Tensor | None, left: Tensor, right: Tensor, alpha: float, start: int, width: int) -> Tensor:
    """``buffer[:, start : start + N] = alpha * left [M, K] @ right [K, N]``; without a buffer, in a new one of ``width`` columns."""
    if buffer is None:
        buffer = left.new_empty((left.shape[0], width))
    part = buffer[:, start : start + right.shape[1]]
    torch.addmm(part, left, right, beta=0, alpha=alpha, out=part)
    return buffer


def accumulate(buffer: Tensor, left: Tensor, right: Tensor, alpha: float) -> Tensor:
    """buffer [M, N] += alpha * left [M, K] @ right [K, N], in place; rounded once."""
    return buffer.addmm_(left, right, alpha=alpha)
