"""One tensor on its way to the host and back, and those that go together; what of its memory is copied."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .host_pool import Buffer


class Group:
    """What one execution of a forward graph sends out. ``seen``: ranks that it has come to; their tensors may have stayed."""

    __slots__ = ("count", "entries", "number", "seen")

    def __init__(self, number: int, count: int) -> None:
        self.number = number
        self.count = count
        self.entries: dict[int, Entry] = {}
        self.seen: set[int] = set()

    def is_alive(self) -> bool:
        return any(entry.is_alive() for entry in self.entries.values())


class Entry:
    """One tensor between forward and backward.

    source:  its device memory, while it has not left; ``version``: of the tensor then, if somebody outside the graph could write to it
    arrived: its device memory again, while it is on its way back and not taken; ``arrival``: the event of that copy
    shared:  its device memory, while some of its parts are taken and some not; ``missing``: how many are not
    stream:  for which the device memory was allocated
    """

    __slots__ = ("arrival", "arrived", "buffer", "dtype", "extent", "group", "intact", "left", "missing", "parts", "rank", "shared",
                 "size", "source", "stream", "stride", "taken", "version")  # fmt: skip

    def __init__(self, group: Group, rank: int, buffer: Buffer, tensor: Tensor, parts: int, watched: bool, stream: Any) -> None:
        self.group, self.rank, self.buffer, self.parts, self.stream = group, rank, buffer, parts, stream
        self.dtype, self.size, self.stride = tensor.dtype, tuple(tensor.shape), tuple(tensor.stride())
        self.extent = extent_of(tensor)
        self.source: Tensor | None = tensor.detach()  # without its history, which would keep the whole step alive
        self.version = tensor._version if watched else None
        self.intact = True  # nobody wrote over the tensor while it was leaving
        self.left: Any = None
        self.arrived: Tensor | None = None
        self.arrival: Any = None
        self.shared: Tensor | None = None
        self.missing = 0
        self.taken = False

    def is_alive(self) -> bool:
        return self.buffer.owner is self and not self.buffer.is_free()

    def on_host(self, part: Tensor, whole: Tensor) -> Tensor:
        """Where a part of it is on the host, laid out as on the device."""
        offset = int(part.storage_offset() - whole.storage_offset())
        return self.buffer.tensor(self.dtype, tuple(part.shape), part.stride(), offset)

    def flat_on_host(self) -> Tensor:
        """All of it in host memory [extent]. Not the tensor that autograd saves: writing here is no change of that one."""
        return self.buffer.tensor(self.dtype, (self.extent,), (1,))

    def is_leaving_from(self, tensor: Tensor) -> bool:
        """Has this tensor's memory not been let go since it was sent."""
        return self.source is not None and self.source.data_ptr() == tensor.data_ptr()

    def let_go(self) -> Tensor | None:
        """The device memory it came from, no longer held here. The caller has waited for the copy."""
        memory, self.source = self.source, None
        if memory is not None and self.version is not None and memory._version != self.version:
            self.intact = False
        return memory


def extent_of(tensor: Tensor) -> int:
    """Elements from a tensor's first to its last in memory, both included."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def lies_in(part: Tensor, whole: Tensor) -> bool:
    """Does all of a tensor lie in the memory of another."""
    offset = part.storage_offset() - whole.storage_offset()
    same = part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() and part.dtype == whole.dtype
    return same and 0 <= offset <= extent_of(whole) - extent_of(part)


def flat(tensor: Tensor, extent: int) -> Tensor:
    """All memory from a tensor's first element to its last."""
    return tensor.detach().as_strided((extent,), (1,), tensor.storage_offset())
