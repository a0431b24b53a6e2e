"""What autograd saves while a forward runs, for tests: each storage once, however many views of it are saved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Saved(dict[int, Tensor]):
    """Storage -> a tensor that lies in it and keeps it alive."""

    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.values())


@contextmanager
def saved_storages(known: Iterable[Tensor]) -> Iterator[Saved]:
    """Collects the storages that are saved for a backward, those left out in which ``known`` tensors lie."""
    lives, saved = {tensor.untyped_storage()._cdata for tensor in known}, Saved()

    def pack(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in lives:
            saved[key] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
