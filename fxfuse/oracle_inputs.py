"""Inputs for checking a row program: random, of the declared kinds, at a given scale, from a generator of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .program import Argument, Program
from .reference import torch_dtype


def draw(program: Program, argument: Argument, shape: Sequence[int], widths: Mapping[str, int], scale: float,
         generator: torch.Generator, positive: bool = False) -> Tensor:
    """One argument, in float64 (or its own int or bool dtype), on the generator's device, already representable in its dtype.

    Data (what varies over rows) is normal, times the scale; a weight scatters around 1, as a trained one does.
    """
    if argument.kind == "bool":
        return torch.rand(shape, generator=generator, device=generator.device) < 0.7
    if argument.kind == "int":
        return _indices(program, argument, shape, widths, generator)
    values = torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)
    if positive:
        values = values.abs() + 0.1
    values = values * scale if any(argument.rows) else 1 + 0.5 * values
    return values.to(torch_dtype(argument.dtype)).double()


def _indices(program: Program, argument: Argument, shape: Sequence[int], widths: Mapping[str, int],
             generator: torch.Generator) -> Tensor:
    """Indices into the axis that they are compared with, with some of the constants that the program treats apart."""
    width, special = _index_facts(program, argument, widths)
    values = torch.randint(0, width, tuple(shape), generator=generator, dtype=torch_dtype(argument.dtype), device=generator.device)
    if special:
        apart = torch.rand(tuple(shape), generator=generator, device=generator.device) < 0.15
        values[apart] = special[0]
    return values


def _index_facts(program: Program, argument: Argument, widths: Mapping[str, int]) -> tuple[int, list[int]]:
    width: int = 8
    special: list[int] = []
    derived = set(program.loads(argument.name))
    for i, node in enumerate(program.nodes):
        if not derived.intersection(node.operands):
            continue
        if node.op == "check_index":
            width = widths[node.attributes[0]]
        if node.op in ("eq", "ne"):
            others = [program.nodes[v] for v in node.operands if v not in derived]
            special += [int(other.attributes[0]) for other in others if other.op == "const"]
        if program.kinds[i] == "int":
            derived.add(i)
    return width, [value for value in special if not 0 <= value < width]
