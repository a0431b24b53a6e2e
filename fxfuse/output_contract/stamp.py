"""Whether a tensor is still what it was: its version, its memory, and a sample of what weights hold.

The version alone does not tell. What is written through ``tensor.data`` (adapters that are merged) does not count it up, nor do
kernels that are given an address.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

SAMPLED = 256  # elements, evenly spread


@dataclass(frozen=True, eq=False)
class Stamp:
    """What a tensor was at one moment."""

    version: int
    address: int
    shape: torch.Size
    sample: Tensor | None  # of a weight; activations belong to one step and nobody writes to them unseen

    def fits(self, value: Tensor) -> bool:
        """Whether ``value`` is still that."""
        if (self.version, self.address, self.shape) != (version_of(value), value.data_ptr(), value.shape):
            return False
        return self.sample is None or torch.equal(self.sample, sample_of(value))


def stamp(value: object) -> Stamp | None:
    """What ``value`` is now; None for what is no tensor."""
    if not isinstance(value, Tensor):
        return None
    sample = sample_of(value) if isinstance(value, nn.Parameter) else None
    return Stamp(version_of(value), value.data_ptr(), value.shape, sample)


def version_of(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


@torch.no_grad()
def sample_of(tensor: Tensor) -> Tensor:
    """Some elements of a tensor, as bytes (where NaN equals itself)."""
    flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().select(0, 0).reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLED)].contiguous().clone().view(torch.uint8)
