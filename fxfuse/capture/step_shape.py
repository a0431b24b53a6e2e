"""How large a step is: rows and length of a batch, and what they make of the sizes that a graph was surveyed for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fxfuse.memory.points import Survey
from fxfuse.memory.sizes import Sizes


@dataclass(frozen=True)
class Shape:
    """rows x length: the two leading sizes of what a model is given (sentences and tokens, pictures and channels)."""

    rows: int
    length: int

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def grown(self, factor: float) -> Shape:
        """A longer one, so that batches that grow step by step are not planned for each time."""
        return Shape(self.rows, -(-int(self.length * factor) // 64) * 64)

    def __str__(self) -> str:
        return f"{self.rows} x {self.length}"


def shape_of(args: tuple, kwargs: dict[str, Any]) -> Shape | None:
    """The shape of a call's first tensor with two sizes or more."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.dim() >= 2:
            return Shape(int(value.shape[0]), int(value.shape[1]))
    return None


def sizes_for(survey: Survey, shape: Shape) -> Sizes:
    """The sizes of a surveyed graph for a batch of another shape than it was compiled for.

    A size that was the batch's rows, its length or their product is that of the new batch; any other stays as it was.
    """
    then = survey.reference
    values = dict(survey.compiled_for)
    if then is None or then == shape:
        return Sizes(values)
    alike = then.rows == then.length  # then the first size is rows, and the next one length, as they come in a tensor's shape
    for n, (symbol, value) in enumerate(values.items()):
        if value == then.rows and not (alike and n % 2):
            values[symbol] = shape.rows
        elif value == then.length:
            values[symbol] = shape.length
        elif value == then.tokens:
            values[symbol] = shape.tokens
    return Sizes(values)
