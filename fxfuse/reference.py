"""A row program executed in torch, value by value: the CPU lowering, and the oracle of every other lowering.

It runs on any device and under fake tensors, in the program's math dtype; what it returns has the shapes, dtypes and memory
layout that the fused op promises.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from .functions import FUNCTIONS
from .program import Argument, Lane, Node, Output, Program


def torch_dtype(name: str) -> torch.dtype:
    """``"bfloat16"`` -> ``torch.bfloat16``."""
    return getattr(torch, name)


def aligned(program: Program, argument: Argument, tensor: Tensor) -> Tensor:
    """A view of ``tensor`` of dimension ``rank + 1``: missing leading dimensions become size 1."""
    missing = program.rank + 1 - tensor.dim()
    return tensor[(None,) * missing] if missing > 0 else tensor


def domain_shape(program: Program, tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """The sizes of the leading dimensions: the broadcast of those of all (aligned) arguments."""
    leading = [1] * program.rank
    for argument, tensor in zip(program.arguments, tensors, strict=True):
        shape = aligned(program, argument, tensor).shape
        for d, varies in enumerate(argument.rows):
            if varies:
                leading[d] = shape[d]
    return tuple(leading)


def axis_widths(program: Program, tensors: Sequence[Tensor]) -> dict[str, int]:
    """The width of every axis, run-time ones read off the tensors."""
    widths = {name: width for name, width in program.axes if width is not None}
    for argument, tensor in zip(program.arguments, tensors, strict=True):
        if isinstance(argument.columns, str):
            widths[argument.columns] = tensor.shape[-1] if tensor.dim() else 1
    return widths


def allocate(program: Program, output: Output, tensors: Sequence[Tensor]) -> Tensor:
    """An uninitialised tensor for one output, laid out in memory as eager's pointwise kernels would.

    It imitates the strides of the first argument of the same shape (a transposed query stays transposed); outputs that no argument
    resembles, and sums over rows, are contiguous.
    """
    leading = domain_shape(program, tensors)
    shape = [size if kept else 1 for size, kept in zip(leading, output.rows, strict=True)]
    widths = axis_widths(program, tensors)
    columns = (
        1
        if output.columns is None
        else widths[output.columns]
        if isinstance(output.columns, str)
        else output.columns
    )
    dtype = torch_dtype(output.dtype)
    for argument, tensor in zip(program.arguments, tensors, strict=True):
        if (
            argument.rows == output.rows
            and argument.columns == output.columns
            and tensor.dim() == program.rank + 1
        ):
            if all(argument.rows):
                return torch.empty_like(tensor, dtype=dtype)
    return torch.empty(*shape, columns, dtype=dtype, device=tensors[0].device)


def execute(program: Program, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Run the program. ``tensors``: one per argument, in order, each broadcastable to its declaration.

    Raises IndexError for an index out of range (``check_index``), as eager's cross entropy does on the CPU.
    """
    with getattr(tensors[0], "fake_mode", nullcontext()):  # constants of a fake execution are fake too
        return _execute(program, tensors)


def _execute(program: Program, tensors: Sequence[Tensor]) -> list[Tensor]:
    views = {a.name: aligned(program, a, t) for a, t in zip(program.arguments, tensors, strict=True)}
    widths = axis_widths(program, tensors)
    device = tensors[0].device
    math = torch_dtype(program.math)
    values: list[Tensor] = []
    for node in program.nodes:
        values.append(_evaluate(node, [values[v] for v in node.operands], views, widths, math, device))
    leading = domain_shape(program, tensors)
    return [_store(program, output, tensors, values, widths, leading) for output in program.outputs]


def lane_slice(lane: Lane, width: int) -> slice:
    return slice(lane.offset, lane.offset + lane.stride * (width - 1) + 1, lane.stride)


def _evaluate(
    node: Node,
    operands: list[Tensor],
    views: dict[str, Tensor],
    widths: dict[str, int],
    math: torch.dtype,
    device: torch.device,
) -> Tensor:
    op = node.op
    if op == "load":
        name, lane = node.attributes
        tensor = views[name] if lane is None else views[name][..., lane_slice(lane, widths[lane.axis])]
        return tensor.to(math) if tensor.is_floating_point() else tensor
    if op == "const":
        value = node.attributes[0]
        return torch.full((), value, dtype=math if isinstance(value, float) else None, device=device)
    if op == "cast":
        return operands[0].to(torch_dtype(node.attributes[0])).to(math)
    if op == "iota":
        return torch.arange(widths[node.attributes[0]], device=device)
    if op == "width":
        return torch.full((), float(widths[node.attributes[0]]), dtype=math, device=device)
    if op == "check_index":
        return _checked_index(operands[0], widths[node.attributes[0]])
    if op == "sum":
        return operands[0].sum(-1, keepdim=True)
    if op == "max":
        return operands[0].amax(-1, keepdim=True)
    if op == "logsumexp":
        return torch.logsumexp(operands[0], -1, keepdim=True)
    if op == "real":
        return operands[0].to(math)
    return FUNCTIONS[op].eager(*operands)


def _checked_index(index: Tensor, width: int) -> Tensor:
    outside = (index < 0) | (index >= width)
    if index.device.type == "cpu" and not _is_fake(index):
        if bool(outside.any()):
            raise IndexError(f"Target {int(index[outside][0])} is out of bounds.")
    elif index.device.type == "cuda" and not _is_fake(index):
        torch._assert_async(~outside.any())
    return index


def _is_fake(tensor: Tensor) -> bool:
    return hasattr(tensor, "fake_mode")


def _store(
    program: Program,
    output: Output,
    tensors: Sequence[Tensor],
    values: list[Tensor],
    widths: dict[str, int],
    leading: tuple[int, ...],
) -> Tensor:
    result = allocate(program, output, tensors)
    summed = [d for d, kept in enumerate(output.rows) if not kept]
    for value, lane in output.stores:
        target = result if lane is None else result[..., lane_slice(lane, widths[lane.axis])]
        columns = 1 if lane is None else widths[lane.axis]
        stored = values[value].expand(*leading, columns)
        target.copy_(stored.sum(summed, keepdim=True) if summed else stored)
    return result
