"""Rows in chunks: how many at once, so that their logits fit a byte budget and the products run at full rate.

Each chunk costs a launch of every product and one reading of the weight, so chunks are as large as the budget allows; of sizes that
need equally many tiles of a product's result in turn, the largest. The products of the backward have a result as small as the chunk
of hidden states, and a device that gets 1.3 tiles for each of its units is idle for a third of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .selection import Selection

LOGITS_BYTES = 336 << 20
# A trained head adds each chunk's part of the weight's gradient to a float32 sum, which is read and written again each time: 12 chunks
# of LOGITS_BYTES cost 8192 rows of 128256 classes at width 4096 a fifth of their time on an H200. So its chunks may be as large as that
# sum in addition (in bytes of a 16-bit weight: twice its size). If one holds all rows, there is no sum.
WEIGHT_SHARE = 2.0
# What cuBLAS gives to one unit of the device at these sizes: rows and columns of a result.
TILE = (128, 256)
# Rows of the buffer start at multiples of this many bytes; cuBLAS has no fast kernel for odd vocabularies otherwise.
ALIGNMENT = 128


def padded_width(width: int, itemsize: int) -> int:
    """The distance of two rows of logits in elements."""
    step = ALIGNMENT // itemsize
    return -(-width // step) * step


def budget(weight_bytes: int) -> int:
    """Bytes that a chunk of logits may have. ``weight_bytes``: of the weight, if its gradient is wanted, else 0."""
    return LOGITS_BYTES + int(WEIGHT_SHARE * weight_bytes)


@lru_cache(maxsize=1024)
def rows_in_chunk(rows: int, row_bytes: int, columns: int, units: int, budget: int = LOGITS_BYTES) -> int:
    """How many of ``rows`` rows of logits of ``row_bytes`` are worked on at once.

    columns: of the hidden states; units: multiprocessors of the device, 0 where sizes are all alike.
    """
    step = TILE[0]
    most = max(budget // row_bytes // step, 1) * step
    if rows <= most:
        return max(rows, 1)
    if not units:
        count = -(-rows // most)
        return -(-rows // count // step) * step
    return min(range(step, most + 1, step), key=lambda size: (_turns(rows, size, columns, units), -size))


def _turns(rows: int, size: int, columns: int, units: int) -> int:
    """How many tiles the busiest unit computes of the gradient of all hidden states, one chunk after the other."""
    tiles = -(-size // TILE[0]) * -(-columns // TILE[1])
    return -(-rows // size) * -(-tiles // units)


def spans(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """Rows from ``start`` to ``stop``, as many at once: (first row, row after the last)."""
    for first in range(start, stop, size):
        yield first, min(first + size, stop)


@dataclass(frozen=True)
class Chunk:
    """Rows start .. stop - 1 of those that are worked on.

    order: which rows these are; None where they are the same ones
    count: int32 [1], on the device: how many of them, from the first on, enter the products; None: all do, or none if ``empty``
    """

    start: int
    stop: int
    order: Tensor | None = None
    count: Tensor | None = None
    empty: bool = False


def chunks(rows: int, size: Callable[[int], int], selection: Selection | None) -> list[Chunk]:
    """All rows, in chunks. ``size(n)``: how many of n rows go together."""
    if selection is None:
        return [Chunk(start, stop) for start, stop in spans(0, rows, size(rows))]
    dense, order = selection.dense, selection.order
    found = [Chunk(start, stop, order[start:stop]) for start, stop in spans(0, dense, size(dense))]
    for start, stop in spans(dense, rows, size(rows - dense)):
        count = (selection.count - start).clamp(0, stop - start).view(1) if selection.asked else None
        found.append(Chunk(start, stop, order[start:stop], count, not selection.asked))
    return found


def units_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0
