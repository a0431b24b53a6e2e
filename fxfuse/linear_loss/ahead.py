"""The row kernel of a head's chunks begins to be compiled as soon as the head is found, while it is still compared with float64.

A kernel over a hundred thousand classes takes seconds to compile, each of its candidates; a head is the last thing of a first step that
is traced and the first that runs after that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..chunk_kernels import runner
from ..program import parse
from . import chunks
from .adjoint import in_place, loss_and_gradient
from .op import STORING


def compile_ahead(on: torch.device, hidden: Tensor, weight: Tensor, bias: Tensor | None, others: Sequence[Tensor],
                  row_weight: Tensor | None, program: str, logits: str, mode: str, wanted: Sequence[str],
                  *terms: Sequence[object]) -> None:
    """Has the kernel of the op's forward compiled for the device. The tensors, those of the op, are forms on the meta device."""
    parsed, stored = parse(program), wanted if mode in STORING else ()
    run = loss_and_gradient(parsed, logits, row_weight is not None) if stored else parsed
    prepared = runner(run, on.type)
    item, width = hidden.element_size(), chunks.padded_width(len(weight), hidden.element_size())
    budget = chunks.budget(weight.numel() * item if "weight" in stored else 0)
    rows = chunks.rows_in_chunk(len(hidden), width * item, hidden.shape[1], chunks.units_of(on), budget)
    z = hidden.new_empty(rows, width)[:, : len(weight)]
    named = dict(zip((a.name for a in parsed.arguments if a.name != logits), others, strict=True))
    if row_weight is not None and stored:
        named[run.arguments[-1].name] = row_weight
    tensors = [z if a.name == logits else named[a.name][:rows] if any(a.rows) else named[a.name] for a in run.arguments]
    outputs = [hidden.new_empty(rows, 1, dtype=reference.torch_dtype(o.dtype)) for o in parsed.outputs]
    outputs += [z if in_place(run, logits) else torch.empty_like(z)] if stored else []
    prepared.compile_ahead(tensors, outputs, on)  # type: ignore[attr-defined]
