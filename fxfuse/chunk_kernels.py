"""The row kernel of a chunk: a row program run into memory that is there already, for the loops of ``linear_loss`` and ``attention``.

Both loops hold one chunk of a large matrix at a time, let cuBLAS write it and a derived row program turn it into something of the
same size in its place. What is shared by them: running a program into given tensors, products in the dtypes that they are given,
and copies into another layout by a row program, which moves rows of 16-byte pieces where a strided copy moves elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial

import torch
from torch import Tensor

from . import reference
from .dataflow import Dataflow
from .lowering import implementation_on
from .program import Lane, Program, ProgramBuilder

RunInto = Callable[[Sequence[Tensor], Sequence[Tensor]], object]


def run_into(program: Program, tensors: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    """Run a row program into given tensors. They may be arguments: every row is read to the end before it is overwritten."""
    runner(program, tensors[0].device.type)(tensors, results)


def runner(program: Program, device: str) -> RunInto:
    """What runs a row program into given tensors on a kind of device. A program takes longer to hash than a launch takes: who runs
    one often keeps this."""
    return _kernel(program) if implementation_on(device) == "triton" else partial(_by_reference, program)


def _by_reference(program: Program, tensors: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    for result, value in zip(results, reference.execute(program, tensors), strict=True):
        result.copy_(value)


@lru_cache(maxsize=256)
def _kernel(program: Program) -> RunInto:
    """The kernel of a chunk. Where single elements of a row are gathered, in the schedule that gathers before it stores."""
    from .kernels.launch import Prepared, prepare

    return Prepared(program, kind="looped") if Dataflow(program).gathers else prepare(program)


def products_as_given(tensor: Tensor) -> AbstractContextManager:
    """Products in the dtypes that they are given, whatever autocast says."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def packed(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor, dense in the order of its dimensions and in ``dtype``; itself where it is."""
    dtype = dtype or tensor.dtype
    if tensor.dtype == dtype and tensor.is_contiguous():
        return tensor
    result = torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
    _copier(tensor.dim() - 1, tensor.dtype, dtype, tensor.device.type)([tensor], [result])
    return result


@lru_cache(maxsize=64)
def _copier(rank: int, dtype: torch.dtype, result: torch.dtype, device: str) -> RunInto:
    names = [str(d).removeprefix("torch.") for d in (dtype, result)]
    builder = ProgramBuilder(rank)
    axis = builder.axis(None)
    builder.argument("x", names[0], (True,) * rank, axis)
    lane = Lane(axis)
    builder.output("y", names[1], (True,) * rank, axis, ((builder.load("x", lane), lane),))
    return runner(builder.build(), device)
