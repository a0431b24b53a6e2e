"""Running ``linear_loss``: a loop over chunks of rows, in which cuBLAS and one derived row kernel take turns.

    for each chunk of rows:
        buffer  = hidden[chunk] weight' + bias         one buffer for all chunks
        losses[chunk], buffer = row program(buffer)     the gradient of the logits in place of the logits
        d hidden[chunk] = buffer weight
        d weight += buffer' hidden[chunk]               in float32; of a single chunk, in its own dtype
        d bias   += column sums of the buffer

The same loop runs on a CPU, with the torch reference in place of the kernel. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import reference
from ..chunk_kernels import products_as_given, run_into
from ..program import Program
from . import chunks
from .adjoint import gradient_alone, in_place, loss_and_gradient
from .products import LINEAR, accumulate, accumulator_dtype, multiply, stored_dtype, transpose

OPERANDS = ("hidden", "weight", "bias")


class Head:
    """The operands of a linear and its loss, and the buffer that holds one chunk of logits."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, others: Sequence[Tensor], program: Program,
                 logits: str, trained: bool = False) -> None:
        """``trained``: the gradient of the weight is wanted."""
        self.hidden, self.weight, self.bias, self.others = hidden, weight, bias, others
        self.program, self.logits = program, logits
        rows, width, item = hidden.shape[0], weight.shape[0], hidden.element_size()
        stride = chunks.padded_width(width, item)
        units = chunks.units_of(hidden.device)
        budget = chunks.budget(weight.numel() * item if trained else 0)
        self.size = chunks.rows_in_chunk(rows, stride * item, hidden.shape[1], units, budget)
        self.spans = list(chunks.spans(rows, self.size))
        self.buffer = hidden.new_empty(min(self.size, rows), stride)[:, :width]

    def logits_of(self, start: int, stop: int) -> Tensor:
        """The logits of some rows, in the buffer; rounded as the linear rounds them."""
        z, x = self.buffer[: stop - start], self.hidden[start:stop]
        if self.bias is None:
            multiply(LINEAR, x, self.weight, out=z)
        else:
            torch.addmm(self.bias, x, self.weight.t(), out=z)
        return z

    def gradient_of(self, program: Program, z: Tensor) -> Tensor:
        """Where the gradient of logits goes: in their place, if the program lets it."""
        return z if in_place(program, self.logits) else torch.empty_like(z)

    def arguments(self, program: Program, z: Tensor, start: int, stop: int, more: dict[str, Tensor]) -> list[Tensor]:
        """The tensors of a program for some rows. ``more``: by name, what are no arguments of the loss."""
        named = dict(zip((a.name for a in self.program.arguments if a.name != self.logits), self.others, strict=True)) | more
        return [
            z if a.name == self.logits else named[a.name][start:stop] if any(a.rows) else named[a.name]
            for a in program.arguments
        ]


    def each(self, chunk: Callable[[int, int], None]) -> None:
        """Calls ``chunk(first row, row after the last)`` for all rows, and lets go of the buffer."""
        with products_as_given(self.hidden):
            for start, stop in self.spans:
                chunk(start, stop)
        del self.buffer


class Gradients:
    """Gradients of the linear's operands, added up chunk by chunk; those of parameters end in the dtypes of ``results``."""

    def __init__(self, head: Head, wanted: Sequence[str], results: Callable[[torch.dtype], torch.dtype]) -> None:
        self.head, self.wanted, self.results = head, wanted, results
        self.hidden = torch.empty_like(head.hidden) if "hidden" in wanted else None
        sums = results if len(head.spans) == 1 else accumulator_dtype
        self.weight = torch.empty_like(head.weight, dtype=sums(head.weight.dtype)) if "weight" in wanted else None
        self.bias = torch.zeros_like(head.bias, dtype=accumulator_dtype(head.bias.dtype)) \
            if "bias" in wanted and head.bias is not None else None
        if not head.spans and self.weight is not None:
            self.weight.zero_()

    def add(self, gradient: Tensor, start: int, stop: int) -> None:
        """The part of some rows; ``gradient``: that of their logits."""
        x = self.head.hidden[start:stop]
        if self.hidden is not None:
            multiply(transpose(LINEAR, 0), gradient, self.head.weight, out=self.hidden[start:stop])
        if self.weight is not None:
            accumulate(transpose(LINEAR, 1), gradient, x, self.weight, first=start == 0)
        if self.bias is not None:
            self.bias += gradient.sum(0, dtype=self.bias.dtype)

    def all(self) -> list[Tensor]:
        """What was wanted."""
        found = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        named = {"hidden": self.head.hidden, "weight": self.head.weight, "bias": self.head.bias}
        return [tensor if name == "hidden" else tensor.to(self.results(named[name].dtype))  # type: ignore[union-attr]
                for name in self.wanted if (tensor := found[name]) is not None]


def forward(head: Head, row_weight: Tensor | None, wanted: Sequence[str]) -> tuple[list[Tensor], list[Tensor]]:
    """(the program's outputs, [rows, 1] each; the gradients of the wanted operands when row i of the first has cotangent w_i)."""
    program = loss_and_gradient(head.program, head.logits, row_weight is not None) if wanted else head.program
    rows = head.hidden.shape[0]
    outputs = [head.hidden.new_empty(rows, 1, dtype=reference.torch_dtype(o.dtype)) for o in head.program.outputs]
    gradients = Gradients(head, wanted, stored_dtype)
    more = {} if row_weight is None or not wanted else {program.arguments[-1].name: row_weight}

    def chunk(start: int, stop: int) -> None:
        z = head.logits_of(start, stop)
        into = [head.gradient_of(program, z)] if wanted else []
        run_into(program, head.arguments(program, z, start, stop, more), [*(o[start:stop] for o in outputs), *into])
        for gradient in into:
            gradients.add(gradient, start, stop)

    head.each(chunk)
    return outputs, gradients.all()


def backward(head: Head, cotangents: dict[str, Tensor], saved: dict[str, Tensor], wanted: Sequence[str]) -> list[Tensor]:
    """The gradients of the wanted operands, the logits computed again. ``cotangents``: by output; ``saved``: row statistics by name."""
    program = gradient_alone(head.program, head.logits, tuple(cotangents))
    more = {f"g_{name}": g for name, g in cotangents.items()} | saved
    gradients = Gradients(head, wanted, lambda dtype: dtype)

    def chunk(start: int, stop: int) -> None:
        z = head.logits_of(start, stop)
        gradient = head.gradient_of(program, z)
        run_into(program, head.arguments(program, z, start, stop, more), [gradient])
        gradients.add(gradient, start, stop)

    head.each(chunk)
    return gradients.all()
