"""4-bit weights that stay dequantized between their uses, where a memory plan has room for them.

A frozen weight has the same numbers in every forward and every backward; to dequantize it takes the time of writing them. A plan that
has nothing else left to buy with its memory lists weights here (memory/dequantized.py), and the first use of each makes a tensor that
the next ones find. The numbers are those of the dequantization, bit for bit.

A kept weight is found by the address of what it is packed in. That memory is held as long as the weight is kept, so that nothing else
can get the address; and it is made again when one of the tensors that it was made of was written to, as their version counters tell.

Matmuls may want room beside or below a weight for thin factors (products/augmented.py), which they write before they read it: it is
kept with as much of both as was ever asked for.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Place = tuple[int, int]  # the address of packed numbers, and their device (-1: the CPU)
Sources = tuple[Tensor | None, ...]  # what a weight is made of: packed numbers first
Room = tuple[int, int]  # rows below and columns beside a weight
Write = Callable[..., object]  # dequantizes: (*sources, where to)

WANTED: dict[Place, Kept] = {}
# What rooms may add to the bytes that a plan counts for a weight.
_WITH_ROOM = 1.05


@dataclass
class Kept:
    """One weight: ``most`` bytes are planned for it. ``weight`` is a view of memory with room, None before its first use."""

    most: int
    weight: Tensor | None = None
    room: Room = (0, 0)
    sources: Sources = ()
    versions: tuple[int, ...] = ()

    def holds(self, sources: Sources, shape: tuple[int, ...], dtype: torch.dtype, room: Room) -> bool:
        """Is the kept tensor what would be made of these sources now, with that room."""
        weight = self.weight
        if weight is None or weight.dtype != dtype or weight.shape != shape or not _covers(self.room, room):
            return False
        return self.versions == _versions(sources) and all(
            ours is theirs or (ours is not None and theirs is not None and ours.data_ptr() == theirs.data_ptr())
            for ours, theirs in zip(self.sources, sources, strict=True))

    def make(self, sources: Sources, shape: tuple[int, ...], dtype: torch.dtype, room: Room, write: Write) -> Tensor | None:
        """The weight made and kept; None where it cannot be."""
        device = sources[0].device  # type: ignore[union-attr]
        room = (max(room[0], self.room[0]), room[1] or self.room[1])
        sizes = shape[0] + room[0], shape[1] + room[1]
        if sizes[0] * sizes[1] * dtype.itemsize > _WITH_ROOM * self.most or not _may_be_kept(sources, device):
            return None
        self.weight = None  # freed before the new one is made
        weight = torch.empty(sizes, dtype=dtype, device=device)[: shape[0], : shape[1]]
        write(*sources, weight)
        self.weight, self.room = weight, room
        self.sources = tuple(None if source is None else source.detach() for source in sources)
        self.versions = _versions(sources)
        return weight


def _covers(has: Room, wanted: Room) -> bool:
    """Is there as much room as is wanted. Columns lie between rows: there are as many as are wanted, or none are."""
    return has[0] >= wanted[0] and (has[1] == wanted[1] or not wanted[1])


def _versions(sources: Sources) -> tuple[int, ...]:
    return tuple(-1 if source is None or source.is_inference() else source._version for source in sources)


def _may_be_kept(sources: Sources, device: torch.device) -> bool:
    """Not what has no version counter, nor what would be an inference tensor or part of a recorded graph's memory."""
    if torch.is_inference_mode_enabled() or any(source is not None and source.is_inference() for source in sources):
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def kept(sources: Sources, shape: tuple[int, ...], dtype: torch.dtype, room: Room | None, write: Write) -> Tensor | None:
    """The weight that is packed in ``sources``, if it is one to be kept."""
    found = WANTED.get(place_of(sources[0]))  # type: ignore[arg-type]
    if found is None:
        return None
    room = room or (0, 0)
    if found.holds(sources, shape, dtype, room):
        return found.weight
    return found.make(sources, shape, dtype, room, write)


def place_of(packed: Tensor) -> Place:
    """How a weight is known."""
    return packed.data_ptr(), packed.get_device()


@dataclass
class Keeper:
    """The weights of one model that are kept. What it holds goes when it is dropped."""

    places: dict[Place, Kept] = field(default_factory=dict)

    def __post_init__(self) -> None:
        weakref.finalize(self, _forget, self.places, self.places.keys()).atexit = False

    @property
    def bytes(self) -> int:
        """What is held now."""
        return sum(entry.weight.untyped_storage().nbytes() for entry in self.places.values() if entry.weight is not None)

    def keep(self, weights: Mapping[Place, int]) -> None:
        """From now on these, with their bytes, and no others."""
        _forget(self.places, self.places.keys() - weights.keys())
        for place, most in weights.items():
            if place not in self.places and place not in WANTED:
                self.places[place] = WANTED[place] = Kept(most)

    def prune(self, alive: Collection[Place]) -> None:
        """Forget weights that are not the model's any more."""
        _forget(self.places, self.places.keys() - set(alive))

    def drop(self) -> None:
        """Keep nothing."""
        self.keep({})


def _forget(places: dict[Place, Kept], gone: Collection[Place]) -> None:
    for place in list(gone):
        if WANTED.get(place) is places.pop(place):
            del WANTED[place]
