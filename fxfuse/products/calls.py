"""What the arranged graphs call: matmuls that write where they are told. Functions of tensors, for generated code.

Those that write into a tensor also return it, so that whoever reads it next depends on them in the graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..lowering import implementation_on
from ..roomy_weights import row_distance, with_tail

OWN = "own"
SHORT = 64  # a contraction over which the result is all that there is to move: kernels/thin_outer.py may be faster than the library


def product(left: Tensor, right: Tensor, alpha: float) -> Tensor:
    """alpha * left [M, K] @ right [K, N], the factor inside the matmul: rounded once."""
    result = left.new_empty((left.shape[0], right.shape[1]))
    if left.shape[1] <= SHORT and implementation_on(left.device.type) == "triton":
        from ..kernels.thin_choice import outer

        outer(left, right, result, alpha)
    else:
        one_product(left, right, result, alpha)
    return result


def one_product(left: Tensor, right: Tensor, out: Tensor, alpha: float, base: Tensor | None = None) -> None:
    """``out = alpha * left @ right``, ``base`` added if there is one, by the library."""
    if base is None:
        torch.addmm(out, left, right, beta=0, alpha=alpha, out=out)
    else:
        torch.addmm(base, left, right, alpha=alpha, out=out)


def columns(buffer: Tensor | None, left: Tensor, right: Tensor, alpha: float, start: int, width: int) -> Tensor:
    """``buffer[:, start : start + N] = alpha * left [M, K] @ right [K, N]``; without a buffer, in a new one of ``width`` columns."""
    if buffer is None:
        buffer = left.new_empty((left.shape[0], width))
    part = buffer[:, start : start + right.shape[1]]
    one_product(left, right, part, alpha)
    return buffer


def thin_pair(buffer: Tensor | None, start: int, width: int, matrix: Tensor, right: Tensor, left: Tensor, alpha: float, beta: float,
              wide: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``columns(buffer, matrix, right, alpha, start, width)`` and ``beta * matrix' @ left`` (``wide``: in float32), reading the matrix
    [M, N] once where that is faster: right [N, R], left [M, R]."""
    rank = right.shape[1]
    if buffer is None:
        buffer = matrix.new_empty((matrix.shape[0], width))
    across = buffer[:, start : start + rank]
    down = matrix.new_empty((matrix.shape[1], rank), dtype=torch.float32 if wide and matrix.itemsize < 4 else None)
    if implementation_on(matrix.device.type) == "triton":
        from ..kernels.thin_choice import pair

        pair(matrix, right, left, across, down, alpha, beta)
    else:
        two_products(matrix, right, left, across, down, alpha, beta)
    return buffer, down


def two_products(matrix: Tensor, right: Tensor, left: Tensor, across: Tensor, down: Tensor, alpha: float, beta: float) -> None:
    """``across = alpha * matrix @ right`` and ``down = beta * matrix' @ left`` by two matmuls, each of which reads the matrix."""
    one_product(matrix, right, across, alpha)
    narrow = down if down.dtype == matrix.dtype else torch.empty_like(down, dtype=matrix.dtype)
    one_product(matrix.t(), left, narrow, beta)
    if narrow is not down:
        down.copy_(narrow)


def accumulate(buffer: Tensor, left: Tensor, right: Tensor, alpha: float) -> Tensor:
    """buffer [M, N] += alpha * left [M, K] @ right [K, N], in place; rounded once."""
    return buffer.addmm_(left, right, alpha=alpha)


def with_room(matrix: Tensor, room: int, planned: bool) -> Tensor:
    """[M, K + room], its first columns the matrix, the others to be written: the matrix's own rows where these were made wider
    (``planned``), else a copy."""
    rows, columns = matrix.shape
    apart = row_distance(columns, room)
    if planned and matrix.stride() == (apart, 1):
        return matrix.as_strided((rows, columns + room), (apart, 1))
    # (One copy of rows of whole lines: on an H200 39 us for 8192 x 4096. Into a part of them, copy_ takes 80.)
    return torch.cat((matrix, matrix.new_empty((rows, apart - columns))), 1)[:, : columns + room]


def beside(weight: Tensor, tail: Tensor, alpha: float, start: int, room: int, planned: bool | str) -> Tensor:
    """[W, 0, alpha * tail, 0]: a weight [N, K] and a thin matrix [N, R] in columns K + start and following, of ``room``. ``planned``:
    was the room left by what made the weight, or is it the weight's own (``OWN``)."""
    own = with_tail(weight, tail, alpha, start, room) if planned == OWN else None
    if own is not None:
        return own
    wide, columns = with_room(weight, room, planned is True), weight.shape[1]
    if tail.shape[1] != room:
        wide[:, columns:].zero_()
    torch.mul(tail, alpha, out=wide[:, columns + start : columns + start + tail.shape[1]])
    return wide


def below(weight: Tensor, tail: Tensor, alpha: float, start: int, room: int, planned: bool) -> Tensor:
    """The same for rows: a weight [K, N] with a thin matrix [R, N] under it."""
    rows, columns = weight.shape
    apart = weight.stride(0)  # a weight that is kept may have room beside it, too
    last = weight.storage_offset() + (rows + room - 1) * apart + columns
    if planned and weight.stride(1) == 1 and weight.untyped_storage().nbytes() >= last * weight.itemsize:
        tall = weight.as_strided((rows + room, columns), (apart, 1))
    else:
        tall = weight.new_empty((rows + room, columns))
        tall[:rows].copy_(weight)
    if tail.shape[0] != room:
        tall[rows:].zero_()
    torch.mul(tail, alpha, out=tall[rows + start : rows + start + tail.shape[0]])
    return tall


def mixed_product(left: Tensor, right: Tensor) -> Tensor:
    """left [M, K] @ right [K, N] in float32, one factor bfloat16 and the other, float32, thin: a matmul of bfloat16 with the thin
    factor's three parts side by side (8 bits of the mantissa each), accumulated in float32."""
    if left.dtype == torch.bfloat16:
        wide = _in_float32(left, torch.cat(parts(right, 3), 1))
        return wide.view(left.shape[0], 3, right.shape[1]).sum(1)
    wide = _in_float32(torch.cat(parts(left, 3), 0), right)
    return wide.view(3, left.shape[0], right.shape[1]).sum(0)


def left_parts(matrix: Tensor) -> Tensor:
    """[high, low, high] of a float32 matrix [M, K], to be multiplied with ``right_parts`` of another: all products but low * low."""
    high, low = parts(matrix, 2)
    return torch.cat((high, low, high), 1)


def right_parts(matrix: Tensor) -> Tensor:
    """[high; high; low] of a float32 matrix [K, N]."""
    high, low = parts(matrix, 2)
    return torch.cat((high, high, low), 0)


def parts(matrix: Tensor, count: int) -> list[Tensor]:
    """bfloat16 matrices whose sum is a float32 one, but for what lies below the last."""
    found: list[Tensor] = []
    for _ in range(count):
        found.append(matrix.bfloat16())
        matrix = matrix - found[-1]
    return found


def _in_float32(left: Tensor, right: Tensor) -> Tensor:
    """The product of two bfloat16 matrices as it is accumulated."""
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
