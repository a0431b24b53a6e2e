"""Running ``linear_loss``: a loop over chunks of rows, in which cuBLAS and one derived row kernel take turns.

    for each chunk of rows:
        logits  = hidden[chunk] weight' + bias          one buffer for all chunks; and left[chunk] right' for every term
        losses[chunk], logits = row program(logits)     the gradient of the logits in place of the logits
        d hidden[chunk] = logits weight
        d weight += logits' hidden[chunk]               in float32; of a single chunk, in its own dtype
        d bias   += column sums of the logits
        d left[chunk], d right                          as those of hidden and weight

Rows that do not read their logits come last, and stay out of the products (selection.py). The same loop runs on a CPU, with the torch
reference in place of the kernel. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..chunk_kernels import products_as_given, run_into
from ..products.calls import left_parts, mixed_product, right_parts
from ..program import Program
from . import chunks
from .adjoint import gradient_alone, in_place, loss_and_gradient
from .chunks import Chunk
from .products import (
    LINEAR,
    accumulate,
    accumulate_counted,
    accumulator_dtype,
    add_multiple,
    left_name,
    multiply,
    multiply_counted,
    right_name,
    stored_dtype,
    sum_counted,
    transpose,
)
from .selection import select

OPERANDS = ("hidden", "weight", "bias")


class Factors(NamedTuple):
    """A term of the logits, ``factor * left right'``: left [rows, R], right [classes, R], both in float32 where the logits are
    bfloat16, or in their dtype."""

    left: Tensor
    right: Tensor
    factor: float

    def is_wide(self, dtype: torch.dtype) -> bool:
        """Are the factors wider than the logits."""
        return self.left.dtype != dtype


def add_term(z: Tensor, left: Tensor, term: Factors) -> None:
    """Add a term to the logits of some rows, whose part of its left factor is ``left``; the sum is rounded once."""
    if term.is_wide(z.dtype):
        z.addmm_(left_parts(left), right_parts(term.right.t()), alpha=term.factor)
    else:
        add_multiple(LINEAR, left, term.right, term.factor, z, first=False)


class Head:
    """The operands of a linear and its loss, the chunks of rows, and the buffer that holds one chunk of logits."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, others: Sequence[Tensor], program: Program,
                 logits: str, trained: bool = False, terms: Sequence[Factors] = ()) -> None:
        """``trained``: the gradient of the weight is wanted."""
        self.hidden, self.weight, self.bias, self.terms = hidden, weight, bias, terms
        self.program, self.logits = program, logits
        named = dict(zip((a.name for a in program.arguments if a.name != logits), others, strict=True))
        item, columns = hidden.element_size(), hidden.shape[1]
        self.stride = chunks.padded_width(weight.shape[0], item)
        budget = chunks.budget(weight.numel() * item if trained else 0)

        def size(rows: int) -> int:
            return chunks.rows_in_chunk(rows, self.stride * item, columns, chunks.units_of(hidden.device), budget)

        whole = trained and size(len(hidden)) >= len(hidden)
        self.selection = select(program, logits, named, hidden, weight, whole)
        self.chunks = chunks.chunks(len(hidden), size, self.selection)
        self.others = self.in_order(named, program)
        self._buffer: Tensor | None = None

    def in_order(self, named: Mapping[str, Tensor], program: Program) -> dict[str, Tensor]:
        """Arguments of a program with their rows in the order in which they are worked on."""
        order = None if self.selection is None else self.selection.order
        by_row = {a.name for a in program.arguments if any(a.rows)}
        return {name: t if order is None or name not in by_row else t.index_select(0, order) for name, t in named.items()}

    def as_given(self, result: Tensor) -> Tensor:
        """Numbers of the rows, back from the order in which they were worked on."""
        if self.selection is None:
            return result
        return torch.empty_like(result).index_copy_(0, self.selection.order, result)

    def rows_of(self, chunk: Chunk, matrix: Tensor | None = None) -> Tensor:
        """The rows of a chunk, of the hidden states or of a matrix beside them."""
        matrix = self.hidden if matrix is None else matrix
        return matrix[chunk.start : chunk.stop] if chunk.order is None else matrix.index_select(0, chunk.order)

    def logits_of(self, chunk: Chunk, x: Tensor) -> Tensor:
        """The logits of a chunk, rounded as the linear rounds them; of rows that do not read them, anything."""
        if chunk.count is not None:
            self._buffer = None
            z = multiply_counted(LINEAR, x, self.weight, chunk.count)
            z = z if self.bias is None else z.add_(self.bias)
        else:
            z = self._room(chunk)
            if chunk.empty:
                return z
            if self.bias is None:
                multiply(LINEAR, x, self.weight, out=z)
            else:
                torch.addmm(self.bias, x, self.weight.t(), out=z)
        for term in self.terms:  # in the model's order: rounded large logits, added to in another, are others
            add_term(z, self.rows_of(chunk, term.left), term)
        return z

    def _room(self, chunk: Chunk) -> Tensor:
        rows, width = chunk.stop - chunk.start, len(self.weight)
        if self._buffer is None or len(self._buffer) < rows:
            self._buffer = None  # first, so that its memory can be had again
            whole = self.hidden.new_empty(rows, self.stride)
            if not whole.is_cuda:
                whole[:, width:] = 0  # products of bfloat16 on CPUs with AMX read, times zero, beyond rows of no multiple of 4
            self._buffer = whole[:, :width]
        return self._buffer[:rows]

    def gradient_of(self, program: Program, z: Tensor) -> Tensor:
        """Where the gradient of logits goes: in their place, if the program lets it."""
        return z if in_place(program, self.logits) else torch.empty_like(z)

    def arguments(self, program: Program, z: Tensor, chunk: Chunk, more: Mapping[str, Tensor]) -> list[Tensor]:
        """The tensors of a program for a chunk. ``more``: by name, in order, what are no arguments of the loss."""
        named = {**self.others, **more}
        return [
            z if a.name == self.logits else named[a.name][chunk.start : chunk.stop] if any(a.rows) else named[a.name]
            for a in program.arguments
        ]

    def each(self, work: Callable[[Chunk], None]) -> None:
        """Calls ``work`` for every chunk, and lets go of the buffer."""
        with products_as_given(self.hidden):
            for chunk in self.chunks:
                work(chunk)
        self._buffer = None


class Gradients:
    """Gradients of the linear's operands, added up chunk by chunk; those of parameters end in the dtypes of ``results``."""

    def __init__(self, head: Head, wanted: Sequence[str], results: Callable[[torch.dtype], torch.dtype]) -> None:
        self.head, self.wanted, self.results = head, wanted, results
        self.hidden = torch.empty_like(head.hidden) if "hidden" in wanted else None
        self.alone = sum(not chunk.empty for chunk in head.chunks) == 1
        self.weight: Tensor | None = None
        self.bias = torch.zeros_like(head.bias, dtype=accumulator_dtype(head.bias.dtype)) \
            if "bias" in wanted and head.bias is not None else None
        self.thin = [ThinGradients(head, k, wanted) for k in range(len(head.terms))]

    def add(self, gradient: Tensor, chunk: Chunk, x: Tensor) -> None:
        """The part of a chunk, whose hidden states are x; ``gradient``: that of their logits, 0 in rows that do not read them."""
        if self.hidden is not None:
            self._add_hidden(self.hidden, gradient, chunk)
        for thin in self.thin:
            thin.add(gradient, chunk)
        if chunk.empty:
            return
        if "weight" in self.wanted:
            self._add_weight(gradient, chunk, x)
        if self.bias is not None:
            self.bias += gradient.sum(0, dtype=self.bias.dtype)

    def _add_weight(self, gradient: Tensor, chunk: Chunk, x: Tensor) -> None:
        product, weight, first = transpose(LINEAR, 1), self.head.weight, self.weight is None
        if chunk.count is not None and self.alone and self.results(weight.dtype) == weight.dtype:
            self.weight = sum_counted(product, gradient, x, chunk.count)
            return
        if self.weight is None:
            sums = self.results if self.alone else accumulator_dtype
            self.weight = torch.empty_like(weight, dtype=sums(weight.dtype))
        if chunk.count is None:
            accumulate(product, gradient, x, self.weight, first)
        else:
            accumulate_counted(product, gradient, x, chunk.count, self.weight, first)

    def _add_hidden(self, into: Tensor, gradient: Tensor, chunk: Chunk) -> None:
        product, weight = transpose(LINEAR, 0), self.head.weight
        if chunk.order is None:
            multiply(product, gradient, weight, out=into[chunk.start : chunk.stop])
            return
        if chunk.empty:
            found = into.new_zeros(len(chunk.order), into.shape[1])
        elif chunk.count is None:
            found = into.new_empty(len(chunk.order), into.shape[1])
            multiply(product, gradient, weight, out=found)
        else:
            found = multiply_counted(product, gradient, weight, chunk.count)
            after = torch.arange(len(found), device=found.device) >= chunk.count
            found.masked_fill_(after.unsqueeze(1), 0.0)
        into.index_copy_(0, chunk.order, found)

    def all(self) -> list[Tensor]:
        """What was wanted."""
        if "weight" in self.wanted and self.weight is None:
            self.weight = torch.zeros_like(self.head.weight)
        found = {"hidden": self.hidden}
        if self.weight is not None:
            found["weight"] = self.weight.to(self.results(self.head.weight.dtype))
        if self.bias is not None:
            found["bias"] = self.bias.to(self.results(self.head.bias.dtype))  # type: ignore[union-attr]
        for k, thin in enumerate(self.thin):
            found |= {left_name(k): thin.left, right_name(k): thin.right_as(self.results)}
        return [tensor for name in self.wanted if (tensor := found.get(name)) is not None]


class ThinGradients:
    """The gradients of a term's factors: of its rows chunk by chunk, of the other added up."""

    def __init__(self, head: Head, k: int, wanted: Sequence[str]) -> None:
        self.head, self.term = head, head.terms[k]
        left, right, _ = self.term
        self.left = torch.zeros_like(left) if left_name(k) in wanted else None
        self.right = torch.zeros_like(right, dtype=accumulator_dtype(right.dtype)) if right_name(k) in wanted else None

    def add(self, gradient: Tensor, chunk: Chunk) -> None:
        """The part of a chunk; ``gradient``: that of its logits, 0 in rows that do not read them."""
        if chunk.empty:
            return
        wide = self.term.is_wide(gradient.dtype)
        if self.right is not None:
            left = self.head.rows_of(chunk, self.term.left)
            if wide:
                self.right += mixed_product(gradient.t(), left)
            else:
                accumulate(transpose(LINEAR, 1), gradient, left, self.right, first=False)
        if self.left is not None:
            rows = slice(chunk.start, chunk.stop) if chunk.order is None else chunk.order
            self.left[rows] = self._of_rows(gradient, wide)

    def _of_rows(self, gradient: Tensor, wide: bool) -> Tensor:
        _, right, factor = self.term
        if wide:
            return mixed_product(gradient, right).mul_(factor)
        found = gradient.new_empty(len(gradient), right.shape[1])
        add_multiple(transpose(LINEAR, 0), gradient, right, factor, found, first=True)
        return found

    def right_as(self, results: Callable[[torch.dtype], torch.dtype]) -> Tensor | None:
        """The gradient of the right factor, rounded once."""
        return None if self.right is None else self.right.mul_(self.term.factor).to(results(self.term.right.dtype))


def forward(head: Head, row_weight: Tensor | None, wanted: Sequence[str]) -> tuple[list[Tensor], list[Tensor]]:
    """(the program's outputs, [rows, 1] each; the gradients of the wanted operands when row i of the first has cotangent w_i)."""
    program = loss_and_gradient(head.program, head.logits, row_weight is not None) if wanted else head.program
    rows = head.hidden.shape[0]
    outputs = [head.hidden.new_empty(rows, 1, dtype=reference.torch_dtype(o.dtype)) for o in head.program.outputs]
    gradients = Gradients(head, wanted, stored_dtype)
    more = {} if row_weight is None or not wanted else head.in_order({program.arguments[-1].name: row_weight}, program)

    def work(chunk: Chunk) -> None:
        x = head.rows_of(chunk)
        z = head.logits_of(chunk, x)
        into = [head.gradient_of(program, z)] if wanted else []
        run_into(program, head.arguments(program, z, chunk, more), [*(o[chunk.start : chunk.stop] for o in outputs), *into])
        for gradient in into:
            gradients.add(gradient, chunk, x)

    head.each(work)
    return [head.as_given(output) for output in outputs], gradients.all()


def backward(head: Head, cotangents: dict[str, Tensor], saved: dict[str, Tensor], wanted: Sequence[str]) -> list[Tensor]:
    """The gradients of the wanted operands, the logits computed again. ``cotangents``: by output; ``saved``: row statistics by name."""
    program = gradient_alone(head.program, head.logits, tuple(cotangents))
    more = head.in_order({f"g_{name}": g for name, g in cotangents.items()} | saved, program)
    gradients = Gradients(head, wanted, lambda dtype: dtype)

    def work(chunk: Chunk) -> None:
        x = head.rows_of(chunk)
        z = head.logits_of(chunk, x)
        gradient = head.gradient_of(program, z)
        run_into(program, head.arguments(program, z, chunk, more), [gradient])
        gradients.add(gradient, chunk, x)

    head.each(work)
    return gradients.all()
