"""The memory that the recordings of a device share, and when a recording may be replayed.

A recording owns what it returns (outputs, values saved for the backward) for as long as it exists; the memory of everything else
that it computed goes back to the pool when it has been recorded, and recordings made later may own it. So

    a replay of R overwrites what R owns, and may overwrite what recordings made after R own; nothing else.

R may therefore be replayed exactly when nobody refers to what R or a later recording has handed out. A step that runs as the steps
before it did never meets such a reference: the blocks' forwards were recorded in order, then their backwards. Where one is met (a
second forward before the backward, an output that somebody kept), the call launches kernel by kernel into memory of its own.
References are counted by torch, in each storage; nobody has to say when a step begins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .._torch import storage_use_count
from .capture import Capture, CudaCapture
from .checkpoints import Waiting

if TYPE_CHECKING:
    from .recording import Recording


class Holding:
    """Memory that a recording owns, by all of its own tensors over it; and whether anybody else has a tensor there."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = list({id(tensor): tensor for tensor in tensors}.values())
        # A storage is referred to by each tensor over it, and by the object that Python has made of it here.
        self._alone = Counter(tensor.untyped_storage()._cdata for tensor in self._tensors)

    def is_held(self) -> bool:
        """Does a tensor other than ours lie in this memory."""
        return any(storage_use_count(storage) > ours + 1 for storage, ours in self._alone.items())

    def held(self) -> set[int]:
        """The storages in which one does."""
        return {storage for storage, ours in self._alone.items() if storage_use_count(storage) > ours + 1}


class Pool:
    """What is recorded on one device."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.waiting = Waiting()
        self.made = 0
        self._owners: WeakValueDictionary[int, Recording] = WeakValueDictionary()
        self._handed_out: dict[Recording, None] = {}

    def number(self) -> int:
        """The place of a new recording in the order."""
        self.made += 1
        return self.made

    def owner(self, tensor: Tensor) -> Recording | None:
        """The recording that owns the memory of a tensor."""
        return self._owners.get(tensor.untyped_storage().data_ptr())  # (0, of a tensor without elements, is nobody's)

    def own(self, recording: Recording, tensors: list[Tensor]) -> None:
        """``recording`` owns the memory of these."""
        for tensor in tensors:
            address = tensor.untyped_storage().data_ptr()
            if address:
                self._owners[address] = recording

    def has_room(self) -> bool:
        """Would as much as is owned now fit twice into what is free."""
        return 2 * sum(recording.bytes for recording in set(self._owners.values())) <= self.capture.free_bytes()

    def handed_out(self, recording: Recording) -> None:
        """Somebody has been given what a recording owns."""
        self._handed_out[recording] = None

    def in_the_way(self, recording: Recording) -> Recording | None:
        """This recording, or one made after it, if somebody refers to what it has handed out. None: it may be replayed."""
        for other in [r for r in self._handed_out if r.number >= recording.number]:
            if other.holding.is_held():
                return other
            del self._handed_out[other]
        return None

    def forget_unheld(self) -> None:
        """Let go of recordings that nothing else keeps and nobody holds memory of."""
        for recording in [r for r in self._handed_out if not r.holding.is_held()]:
            del self._handed_out[recording]


@cache
def pool_of(index: int) -> Pool:
    """The pool of a CUDA device."""
    _pools.append(pool := Pool(CudaCapture(index)))
    return pool


_pools: list[Pool] = []


def forget_unheld() -> None:
    """Let every pool go of recordings that nobody needs."""
    for pool in _pools:
        pool.forget_unheld()


def device_index(arguments: list) -> int | None:
    """The index of the CUDA device that the first tensor on one lies on."""
    return next((a.get_device() for a in arguments if isinstance(a, torch.Tensor) and a.is_cuda), None)
