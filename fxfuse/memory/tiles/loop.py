"""The run of a part of a graph in tiles: for each tile of rows its graph, the results into memory made before.

    for start in 0, R, 2R, ... T:   y[start : start + R] = f(x[start : start + R], W);   S += g(x[start : start + R])

Sums over rows are kept in float32 (or wider), added up in the order of the tiles, and rounded once: two runs give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor

from ..._torch import graph_is_kept
from ...linear_loss.products import accumulator_dtype, adds_to_wider
from ...lowering import is_held
from .rows import Rows

STEP = 128  # rows of a tile are a multiple: what matmuls are cut into
FEW_ROWS = 1024  # in a tile of fewer matmuls do not fill the device, and so few hold no memory to speak of


@dataclass(frozen=True)
class Place:
    """One result. ``rows``: of it, empty for a sum over rows. ``sizes``: of its other dimensions, in order.

    like:    the operand whose rows have the sizes of this one's
    over:    the operand in whose memory it may lie, if nobody else wants that
    written: the tile's graph writes it where it is told
    """

    rows: Rows
    sizes: tuple[int, ...]
    dtype: torch.dtype
    like: int = 0
    over: int | None = None
    written: bool = False

    @property
    def is_sum(self) -> bool:
        return not self.rows


@dataclass(frozen=True)
class Loop:
    """rows:    of each operand, empty for what every tile reads whole
    places:  the results
    largest: rows of a tile at most
    count:   tiles that a plan counts on; fewer rows than were compiled for are cut into as many, down to FEW_ROWS each
    saved:   operands that may be written over and were saved for the backward: to be looked at when it runs
    tile:    the graph of one tile; ``tile_in_place``: that which writes over operands, if any may be written over
    """

    rows: tuple[Rows, ...]
    places: tuple[Place, ...]
    largest: int
    count: int
    saved: tuple[int, ...]
    tile: Callable[[list], Sequence[Tensor]]
    tile_in_place: Callable[[list], Sequence[Tensor]] | None

    def __call__(self, operands: Sequence[Any]) -> list[Tensor]:
        run = self.tile_in_place if self._is_free(operands) else None
        first = next(i for i, rows in enumerate(self.rows) if rows)
        total = prod(operands[first].shape[d] for d in self.rows[first])
        whole = [self._made(p, operands, total) if run is None or p.over is None else operands[p.over] for p in self.places]
        flat = [flattened(t, rows) if rows else t for t, rows in zip(operands, self.rows, strict=True)]
        sinks = [t if p.is_sum else flattened(t, p.rows) for t, p in zip(whole, self.places, strict=True)]
        size = tile_rows(total, self.largest, self.count)
        for start in range(0, total, size):
            self._run(run or self.tile, flat, sinks, start, min(size, total - start))
        return [t.to(p.dtype) if p.is_sum else t for t, p in zip(whole, self.places, strict=True)]

    def _run(self, run: Callable[[list], Sequence[Tensor]], flat: Sequence[Any], sinks: Sequence[Tensor], start: int,
             size: int) -> None:
        """One tile."""
        parts = [part(t, rows, start, size) if rows else t for t, rows in zip(flat, self.rows, strict=True)]
        targets = [t if p.is_sum else part(t, p.rows, start, size) for t, p in zip(sinks, self.places, strict=True)]
        told = [t for t, p in zip(targets, self.places, strict=True) if p.written]
        results = run([*parts, *told])
        for result, target, place in zip(results, targets, self.places, strict=True):
            if not place.written and not _same_memory(result, target):
                target.copy_(result)

    def _is_free(self, operands: Sequence[Any]) -> bool:
        """May operands be written over now: these are laid out as known, the autograd graph is not kept and nobody holds them."""
        if self.saved and (graph_is_kept() or any(is_held(operands[i]) for i in self.saved)):
            return False
        return all(operands[p.over].is_contiguous() for p in self.places if p.over is not None)

    def _made(self, place: Place, operands: Sequence[Any], total: int) -> Tensor:
        """Memory for a result."""
        device = operands[place.like].device
        if place.is_sum:
            return torch.zeros(place.sizes, dtype=accumulator_dtype(place.dtype), device=device)
        counts = [operands[place.like].shape[d] for d in self.rows[place.like]] if len(place.rows) > 1 else [total]
        at = place.rows[0]
        return torch.empty([*place.sizes[:at], *counts, *place.sizes[at:]], dtype=place.dtype, device=device)


def _same_memory(a: Tensor, b: Tensor) -> bool:
    """Does a result lie where it is wanted."""
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata and a.storage_offset() == b.storage_offset()


def tile_rows(total: int, largest: int, planned: int = 1) -> int:
    """Rows of a tile: as few tiles as ``largest`` and the number that is ``planned`` allow, of about equal size."""
    largest = min(largest, max(ceil(total / planned / STEP) * STEP, FEW_ROWS))
    count = ceil(total / largest)
    return min(largest, ceil(total / count / STEP) * STEP) if count > 1 else max(total, 1)


def flattened(tensor: Tensor, rows: Rows) -> Tensor:
    """A tensor with its rows in one dimension (copied, where it is not laid out so)."""
    return tensor if len(rows) == 1 else tensor.flatten(rows[0], rows[-1])


def part(flat: Tensor, rows: Rows, start: int, size: int) -> Tensor:
    """Some rows of a flattened tensor, in as many dimensions as it had: all but the last of them of size 1."""
    found = flat.narrow(rows[0], start, size)
    for _ in rows[1:]:
        found = found.unsqueeze(rows[0])
    return found


def add_product(total: Tensor, left: Tensor, right: Tensor, alpha: float) -> Tensor:
    """total [M, N] += alpha * left [M, K] @ right [K, N], in the sum's dtype (float32 for 16-bit factors)."""
    if left.dtype == total.dtype:
        return total.addmm_(left, right, alpha=alpha)
    if not total.is_cuda:
        return total.addmm_(left.to(total.dtype), right.to(total.dtype), alpha=alpha)
    if adds_to_wider(left.dtype, total.device):
        return torch.ops.aten.addmm.dtype_out(total, left, right, total.dtype, alpha=alpha, out=total)
    return total.add_(torch.ops.aten.mm.dtype(left, right, total.dtype), alpha=alpha)


def add_to(total: Tensor, more: Tensor) -> Tensor:
    """total += more, a sum over the rows of one tile."""
    return total.add_(more)


def product_into(target: Tensor, left: Tensor, right: Tensor, alpha: float) -> Tensor:
    """target [M, N] = alpha * left [M, K] @ right [K, N]."""
    return torch.addmm(target, left, right, beta=0, alpha=alpha, out=target)
