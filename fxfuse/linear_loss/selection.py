"""Rows whose loss does not read their logits stay out of the products: half of a chat's tokens are not trained on.

Which rows count is known on the device, and nobody waits for it. They are taken first, in their order (a stable sort of one bit a row);
their number stays on the device:

    rows   0 ........ dense ........................ all
           cuBLAS     a grouped product of one group, whose end is the number of rows that count

``dense`` is what earlier calls let expect (counted.py). A grouped product that finds no rows costs a launch. On a CPU the number is
known, and rows after it are not multiplied at all. Gradients of the hidden states of rows that do not count are 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import reference
from .._torch import FakeTensor
from ..program import Program
from .counted import Counted, counted
from .products import groups_on_device
from .reading import is_guarded, reading_rows

# Below these shares of rows that count they are taken apart. Where the gradient of a weight is one product over all rows, all products
# are grouped ones then, which take 2 to 6% longer than cuBLAS (H200, benchmarks/linear_loss.py --probe).
PARTS, WHOLE = 0.9, 0.87
STEP = 128  # rows of one tile of a product


@dataclass(frozen=True)
class Selection:
    """The rows of a head in the order in which they are worked on.

    order: [rows] int64, those that count first        count: int32 on the device, how many count
    dense: the first rows, multiplied whatever they are
    asked: rows after these are multiplied as far as ``count`` says; else none of them counts
    """

    order: Tensor
    count: Tensor
    dense: int
    asked: bool


def select(program: Program, logits: str, arguments: Mapping[str, Tensor], hidden: Tensor, weight: Tensor,
           whole: bool) -> Selection | None:
    """The rows that count first; None where all are worked on as they lie.

    arguments: of the loss, by name, without the logits        whole: the gradient of the weight is to be one product over all rows
    """
    reads = reading_rows(program, logits) if is_guarded(program, logits) else None
    if reads is None or not len(hidden) or _several_columns(program, logits) or isinstance(hidden, FakeTensor):
        return None
    on_host = _number_is_here(hidden)
    if not on_host and (not groups_on_device(hidden, weight) or _all_expected(program, hidden, weight, whole)):
        return None
    counts, = reference.execute(reads, [arguments[a.name] for a in reads.arguments])
    count = counts.sum(dtype=torch.int32)
    dense = int(count) if on_host else _expected(program, hidden, weight, count, whole)
    if dense == len(hidden):
        return None
    order = torch.sort(counts.view(-1), descending=True, stable=True).indices
    return Selection(order, count, dense, not on_host)


def _number_is_here(tensor: Tensor) -> bool:
    """Can the host read a number without waiting."""
    return not tensor.is_cuda


def _several_columns(program: Program, logits: str) -> bool:
    """Has another argument as many columns as the logits: taking its rows apart would be a copy of as many bytes."""
    return any(a.name != logits and a.columns not in (None, 1) and any(a.rows) for a in program.arguments)


def _known(program: Program, hidden: Tensor, weight: Tensor, whole: bool) -> Counted:
    return counted((program, hidden.device, tuple(weight.shape), whole))


def _all_expected(program: Program, hidden: Tensor, weight: Tensor, whole: bool) -> bool:
    """Are all rows multiplied, and not even counted: where results must not depend on time, or where most counted in earlier calls."""
    if torch.are_deterministic_algorithms_enabled():
        return True
    if torch.cuda.is_current_stream_capturing():
        return False
    return _known(program, hidden, weight, whole).passes(WHOLE if whole else PARTS)


def _expected(program: Program, hidden: Tensor, weight: Tensor, count: Tensor, whole: bool) -> int:
    """How many rows cuBLAS multiplies: all while nothing is known, and where most count."""
    rows, known = len(hidden), _known(program, hidden, weight, whole)
    if not torch.cuda.is_current_stream_capturing():
        known.send(count, rows)
    if known.share is None or known.share > (WHOLE if whole else PARTS):
        return rows
    return 0 if whole else min(-(-int(known.share * rows) // STEP) * STEP, rows)
