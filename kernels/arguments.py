"""What a program demands of its tensors, checked once for each combination of shapes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fxfuse import reference
from fxfuse.errors import EmissionError
from fxfuse.program import Program


def check_arguments(program: Program, tensors: Sequence[Tensor]) -> None:
    """Raises EmissionError unless the tensors are what the program declares; all on one device."""
    widths: dict[str, int] = {}
    rows: dict[int, int] = {}
    if len(tensors) != len(program.arguments):
        raise EmissionError(f"{len(program.arguments)} tensors are needed, {len(tensors)} were given")
    for argument, tensor in zip(program.arguments, tensors, strict=True):
        where = f"argument {argument.name} : {tensor.dtype} {tuple(tensor.shape)}"
        if tensor.dtype != reference.torch_dtype(argument.dtype):
            raise EmissionError(f"{where} is declared {argument}; cast it before the call")
        if tensor.device != tensors[0].device:
            raise EmissionError(f"{where} is on {tensor.device}, others are on {tensors[0].device}; move it")
        if tensor.dim() > program.rank + 1:
            raise EmissionError(f"{where} has more dimensions than the program (rank {program.rank} and columns)")
        columns = tensor.shape[-1] if tensor.dim() else 1
        expected = argument.columns if isinstance(argument.columns, int) else 1
        if isinstance(argument.columns, str):
            expected = widths.setdefault(argument.columns, program.width(argument.columns) or columns)
        if columns != expected:
            raise EmissionError(f"{where}: the last dimension must be {expected}, as {argument} says")
        shape = (1,) * (program.rank + 1 - tensor.dim()) + tuple(tensor.shape[:-1])
        if any(size != 1 and not varies for size, varies in zip(shape, argument.rows, strict=True)):
            raise EmissionError(f"{where} varies over a dimension that {argument} broadcasts")
        for d, (size, varies) in enumerate(zip(shape, argument.rows, strict=True)):
            if varies and rows.setdefault(d, size) != size:
                raise EmissionError(f"{where} has {size} rows along dimension {d}, others have {rows[d]}")
