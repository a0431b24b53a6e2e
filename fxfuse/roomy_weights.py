"""Frozen 16-bit weights whose rows have room beside them for an adapter's thin matrix.

    storage [out, in + R]  =  [W | s B]         x W' + s h B'  =  [x, h] [W, s B]'

A weight that lies so is the same ``Parameter``, of the same shape and values; its rows are further apart. Matmuls of
products/augmented.py write what they read into the room, each time before they read it: what another adapter, another step or an
evaluation left there is never read. Writers and readers are on one stream, the one that the weight was moved on; on any other a weight
is taken to have no room (it is copied beside its tail), so two streams never meet in it. Zeros around a tail are written when its place
changes. Two threads that run one module on one stream write the same bytes; a weight that two modules share is not moved at all
(capture/rooms.py decides).

What is written does not count as a change of the weight (its version counter stays), as its own elements do not change.

Whether a tensor lies in such a storage is known here, by the storage itself and not by strides: a view of somebody's wider matrix
looks alike, and its neighbours are somebody's data. Storages are held weakly; an entry keeps the identity of its storage from being
used again.

There are no rows below, for backwards: the gradients that they would serve lie in the memory of what they are gradients of, or come
without room, and steps in which they were copied were no faster.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

# Elements of 16 bits: 16 bytes, and a line of 128 bytes. On an H200 a matmul of 8192 x 4096 with 14336 x 4096 took 1.459 ms with rows
# that were 4112 apart, and 1.442 with 4160.
ALIGNED, LINE = 8, 64
LONG = 2048  # columns from which a line more is little


def row_distance(columns: int, room: int) -> int:
    """Elements from a row to the next in a matrix of 16 bits with room for so many columns more."""
    step = LINE if columns >= LONG else ALIGNED
    return -(-(columns + room) // step) * step


@dataclass
class Home:
    """A storage with room: of a weight ``shape`` [out, in] and ``room`` columns more, which only ``stream`` may use.

    tail: first column and number of columns of what was last written in the room; the others are zero
    """

    storage: StorageWeakRef
    shape: tuple[int, int]
    dtype: torch.dtype
    room: int
    stream: int
    tail: tuple[int, int] = (0, 0)

    @property
    def stride(self) -> tuple[int, int]:
        return self.shape[1] + self.room, 1


_homes: dict[int, Home] = {}


def move(weight: nn.Parameter, room: int) -> None:
    """Give a weight [out, in] room: ``room`` columns, rounded up. Its storage is another one afterwards."""
    rows, columns = weight.shape
    room = row_distance(columns, room) - columns
    with torch.no_grad():
        storage = weight.data.new_empty((rows, columns + room))
        storage[:, :columns].copy_(weight.data)
        storage[:, columns:].zero_()
        weight.data = storage[:, :columns]
    for key in [key for key, home in _homes.items() if home.storage.expired()]:
        del _homes[key]
    handle = weight.untyped_storage()
    _homes[handle._cdata] = Home(StorageWeakRef(handle), (rows, columns), weight.dtype, room, _stream(weight))


def give_back(weight: nn.Parameter) -> bool:
    """Make a weight that was moved contiguous again, without room; whether it had any."""
    if home_of(weight) is None:
        return False
    del _homes[weight.untyped_storage()._cdata]
    with torch.no_grad():
        weight.data = weight.data.contiguous()
    return True


def home_of(weight: Tensor) -> Home | None:
    """The storage with room that a weight lies in, as a whole; None for any other tensor."""
    home = _homes.get(weight.untyped_storage()._cdata)
    if home is None or weight.shape != home.shape or weight.storage_offset() or weight.stride() != home.stride:
        return None
    return home


def is_promised(value: Tensor, room: int) -> bool:
    """While a graph is compiled: is there a weight with that much room which a (fake) tensor can stand for, going by its layout."""
    layout = tuple(value.shape), tuple(value.stride()), value.dtype
    return any(layout == (home.shape, home.stride, home.dtype) and home.room >= room and not home.storage.expired()
               for home in _homes.values())  # fmt: skip


def with_tail(weight: Tensor, tail: Tensor, alpha: float, start: int, room: int) -> Tensor | None:
    """[W, 0, alpha * tail, 0] with ``room`` columns beside W [N, K], in the weight's own memory; None where that has no room.

    ``tail`` [N, R] comes to columns K + start and following.
    """
    home = home_of(weight)
    if home is None or home.room < room or home.stream != _stream(weight):
        return None
    columns, place = home.shape[1], (start, tail.shape[1])
    whole = weight.data.as_strided((home.shape[0], columns + home.room), home.stride)  # (.data: with a version counter of its own)
    if home.tail != place:
        whole[:, columns:].zero_()
        home.tail = place
    torch.mul(tail, alpha, out=whole[:, columns + start : columns + start + tail.shape[1]])
    return whole[:, : columns + room]


def _stream(weight: Tensor) -> int:
    """The stream that work on a weight is put on; 0 without a GPU."""
    return torch.cuda.current_stream(weight.device).cuda_stream if weight.is_cuda else 0
