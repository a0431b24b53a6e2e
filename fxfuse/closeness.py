"""How near to float64 a result is, in units of eager's own error, and whether it overflows where eager does.

    ratio = rmse(ours - truth) / max(rmse(eager - truth), floor * ulp(dtype) * rms(truth))

Five numbers say it of a result. They are found where the result lies and read together for many results: to wait for a GPU time and
again takes longer than the sums do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# A result of so few numbers has an error that is luck, and eager's may be zero: its floor is two ulps.
FEW = 8


class Closeness(NamedTuple):
    """error, eager_error: root mean squares of the distances to the truth where all three are finite; size: of the truth there.
    overflows_alike: see ``same_overflow``."""

    error: float
    eager_error: float
    size: float
    overflows_alike: bool

    def ratio(self, dtype: torch.dtype, count: int) -> float:
        """The error ratio of ``count`` numbers of a dtype; at most 1 where ours is as good as eager's."""
        floor = 2.0 if count <= FEW else 0.25 if dtype.itemsize == 2 else 1.0
        allowed = max(self.eager_error, torch.finfo(dtype).eps * self.size * floor)
        return 0.0 if self.error == 0 else self.error / allowed if allowed > 0 else math.inf


def closeness(results: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[Closeness]:
    """Of each (ours, eager, truth); of results on one device read at once."""
    if not results:
        return []
    sums = [_sums(*result) for result in results]
    rows = torch.stack(sums).tolist() if len({row.device for row in sums}) == 1 else [row.tolist() for row in sums]
    found = []
    for error, eager_error, size, count, alike in rows:
        root = math.sqrt(max(count, 1))
        found.append(Closeness(error / root, eager_error / root, size / root, alike == 1))
    return found


def _sums(ours: Tensor, eager: Tensor, truth: Tensor) -> Tensor:
    """float64 [5]: the norms of both errors and of the truth over the elements where all are finite, how many these are, and 1 where
    overflows are alike."""
    a, b, t = ours.double(), eager.double(), truth.double()
    kept, eager_kept = torch.isfinite(a), torch.isfinite(b)
    finite = kept & eager_kept & torch.isfinite(t)
    unholdable = ~(t.abs() <= 1.01 * torch.finfo(ours.dtype).max)
    unlike = (~kept & eager_kept) | (unholdable & ~eager_kept & kept)
    norms = [torch.linalg.vector_norm(torch.where(finite, values, 0.0)) for values in (a - t, b - t, t)]
    return torch.stack([*norms, finite.sum().double(), 1.0 - unlike.any().double()])


def error_ratio(ours: Tensor, eager: Tensor, truth: Tensor) -> float:
    """How much further from the truth ours is than eager's; at most 1 when it is as good. Non-finite elements are left out."""
    return closeness([(ours, eager, truth)])[0].ratio(ours.dtype, truth.numel())


def same_overflow(ours: Tensor, eager: Tensor, truth: Tensor) -> bool:
    """Is ours non-finite only where eager is, and wherever eager is for the reason that the dtype cannot hold the truth."""
    return closeness([(ours, eager, truth)])[0].overflows_alike
