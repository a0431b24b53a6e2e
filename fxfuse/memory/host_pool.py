"""A bounded pool of host memory, for tensors that live there between forward and backward.

A buffer is taken when a tensor is sent out, and nobody gives it back: it is free as soon as the pool alone holds its memory. So it
does not matter how a step ends (its backward ran, an exception stopped it, its loss was dropped): when autograd lets go
of the tensor, the buffer is free, and no finalizer is needed for that.

Buffers are cut from larger pieces, since torch rounds every piece of pinned memory up to a power of two. To pin memory takes half a
second for a gigabyte: a piece that is free is cut anew, for the longer sequence that has come, before another is made.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch import storage_use_count
from .budget import parse_budget
from .plan import size_text

logger = logging.getLogger("fxfuse")

LIMIT_VARIABLE = "FXFUSE_HOST_MEMORY"  # bytes, a size such as "16GiB", a fraction of what is available, or 0: none
_TOGETHER = 4  # buffers of a size for which a piece of memory is allocated at once
_SHARE = 0.5  # of the host memory that is available when the first tensor is sent out, if nobody says otherwise


class Buffer:
    """Host memory for one tensor at a time.

    owner: whose tensor is in it, or was last; written, read: events of the last copies into it and out of it, or None
    taken: the number of the last taking
    """

    __slots__ = ("_alone", "owner", "read", "size", "storage", "taken", "written")

    def __init__(self, piece: Tensor, offset: int, size: int) -> None:
        """``size`` bytes of a piece of memory, from ``offset`` on, as a storage of its own."""
        self.size = size
        memory = (ctypes.c_ubyte * size).from_address(piece.data_ptr() + offset)
        memory.piece = piece  # type: ignore[attr-defined]  # which lives as long as any tensor in this part of it
        self.storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
        self._alone = storage_use_count(self.storage._cdata)
        self.owner: Any = None
        self.written: Any = None
        self.read: Any = None
        self.taken = 0

    def is_free(self) -> bool:
        """Does no tensor but the pool's own lie in this memory."""
        return storage_use_count(self.storage._cdata) <= self._alone

    def tensor(self, dtype: torch.dtype, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> Tensor:
        """A tensor in this memory; no view of another, so it has a version counter of its own."""
        return torch.empty(0, dtype=dtype, device="cpu").set_(self.storage, offset, size, stride)


class Lease(NamedTuple):
    """A buffer that is nobody else's while ``tensor``, all of it, or another tensor in it is there."""

    buffer: Buffer
    tensor: Tensor


class Piece:
    """Memory that buffers are cut from, front to back."""

    __slots__ = ("buffers", "memory", "used")

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.used = 0
        self.buffers: list[Buffer] = []

    def cut(self, size: int) -> Buffer | None:
        """The next buffer of this size, None if there is no room."""
        if self.used + size > self.memory.numel():
            return None
        self.buffers.append(Buffer(self.memory, self.used, size))
        self.used += size
        return self.buffers[-1]

    def is_free(self) -> bool:
        """Does no tensor lie in it."""
        return all(buffer.is_free() for buffer in self.buffers)

    def taken(self) -> int:
        """The number of the last taking of one of its buffers."""
        return max((buffer.taken for buffer in self.buffers), default=0)


class HostPool:
    """Buffers of one kind of host memory; the pieces that they are cut from have at most ``limit`` bytes together.

    Safe to use from several threads.
    """

    def __init__(self, allocate: Callable[[int], Tensor], limit: int | None = None) -> None:
        """allocate: gives uint8 memory of a size; limit: bytes, None for ``default_limit()`` when the first buffer is taken."""
        self._allocate = allocate
        self._limit = limit
        self._lock = threading.Lock()
        self._buffers: dict[int, deque[Buffer]] = {}
        self._by_address: dict[int, Buffer] = {}
        self._pieces: list[Piece] = []
        self.bytes = 0  # of all pieces
        self._taken = 0

    @property
    def limit(self) -> int:
        """The most bytes that the pool may have."""
        if self._limit is None:
            self._limit = default_limit()
        return self._limit

    @limit.setter
    def limit(self, count: int) -> None:
        with self._lock:
            self._limit = count
            self._shrink_to(count)

    def take(self, count: int) -> Lease | None:
        """A free buffer of at least ``count`` bytes, None if the limit allows no more."""
        size = _rounded(count)
        with self._lock:
            found = self._free_of(size, 2 * size) or self._grow(size) or self._free_of(size)
            if found is None and self._shrink_to(max(self.limit - size, 0)):
                found = self._grow(size)
            if found is None:
                return None
            self._taken = found.taken = self._taken + 1
            return Lease(found, found.tensor(torch.uint8, (found.size,), (1,)))

    def expect(self, count: int, buffers: int) -> threading.Thread:
        """That many buffers of at least ``count`` bytes will be taken: memory for them is allocated meanwhile, on a thread of its own.

        (To pin memory takes half a second for a gigabyte, and holds neither the device nor the interpreter.)
        """
        thread = threading.Thread(target=self._allocate_ahead, args=(_rounded(count), buffers), name="fxfuse-host-memory", daemon=True)
        thread.start()
        return thread

    def _allocate_ahead(self, size: int, buffers: int) -> None:
        wanted = _power_of_two(_TOGETHER * size)
        for _ in range(-(-buffers * size // wanted)):
            with self._lock:
                room = self.limit - self.bytes >= wanted
                self.bytes += wanted if room else 0
            if not room:
                return
            try:
                piece = Piece(self._allocate(wanted))
            except RuntimeError:  # said by whoever needs the memory, if anybody does
                with self._lock:
                    self.bytes -= wanted
                return
            with self._lock:
                self._pieces.append(piece)

    def find(self, tensor: Tensor) -> Buffer | None:
        """The buffer in which a tensor lies."""
        return self._by_address.get(tensor.untyped_storage().data_ptr()) if tensor.device.type == "cpu" else None

    def release(self) -> None:
        """Give all memory in which no tensor lies back to the system."""
        with self._lock:
            self._shrink_to(0)

    def in_use(self) -> int:
        """Bytes of buffers that hold a tensor."""
        return sum(buffer.size for piece in self._pieces for buffer in piece.buffers if not buffer.is_free())

    def _free_of(self, least: int, most: float = float("inf")) -> Buffer | None:
        """A free buffer of such a size, as small as there is one; of those the one that was taken longest ago."""
        for size in sorted(size for size in self._buffers if least <= size <= most):
            ring = self._buffers[size]
            for _ in range(len(ring)):
                buffer = ring[0]
                ring.rotate(-1)
                if buffer.is_free():
                    return buffer
        return None

    def _grow(self, size: int) -> Buffer | None:
        """A new buffer: where there is room in a piece, in one that is cut anew, or in a new one."""
        buffer = next((cut for piece in self._pieces if (cut := piece.cut(size)) is not None), None)
        if buffer is None:
            piece = self._emptied(size) or self._new_piece(size)
            if piece is None:
                return None
            buffer = piece.cut(size)
        assert buffer is not None
        self._buffers.setdefault(size, deque()).append(buffer)
        self._by_address[buffer.storage.data_ptr()] = buffer
        return buffer

    def _emptied(self, size: int) -> Piece | None:
        """Of the pieces in which no tensor lies, emptied, that whose buffers (for shorter sequences?) were not taken for longest."""
        free = [piece for piece in self._pieces if piece.memory.numel() >= size and piece.is_free()]
        piece = min(free, key=Piece.taken, default=None)
        if piece is not None:
            self._forget(piece)
        return piece

    def _forget(self, piece: Piece) -> None:
        """A piece's buffers, which are free, are there no longer."""
        for buffer in piece.buffers:
            for event in (buffer.written, buffer.read):
                if event is not None:
                    event.synchronize()  # torch's allocator does not know of copies to and from parts of a piece
            self._buffers[buffer.size].remove(buffer)
            del self._by_address[buffer.storage.data_ptr()]
        piece.buffers, piece.used = [], 0

    def _new_piece(self, size: int) -> Piece | None:
        """Memory for several buffers of a size, or for one if the limit leaves no more."""
        wanted = _power_of_two(_TOGETHER * size)
        while wanted > self.limit - self.bytes:
            wanted //= 2
            if wanted < size:
                return None
        try:
            memory = self._allocate(wanted)
        except RuntimeError as error:  # the system lets us pin no more: that is the limit, then
            logger.warning("host memory for offloaded tensors ends at %s: %s", size_text(self.bytes), str(error).splitlines()[0])
            self._limit = self.bytes
            return None
        self._pieces.append(Piece(memory))
        self.bytes += wanted
        return self._pieces[-1]

    def _shrink_to(self, count: int) -> bool:
        """Give up pieces in which no tensor lies, until all together have at most ``count`` bytes; whether any was given up."""
        before = self.bytes
        for piece in list(self._pieces):
            if self.bytes > count and piece.is_free():
                self._forget(piece)
                self._pieces.remove(piece)
                self.bytes -= piece.memory.numel()
        if self.bytes < before and torch.cuda.is_available():
            from .._torch import host_empty_cache

            host_empty_cache()  # torch keeps pinned memory that was freed
        return self.bytes < before


def _rounded(count: int) -> int:
    """Bytes rounded up, by an eighth at most, so that tensors of similar sizes can have each other's buffers."""
    step = max(_power_of_two(count) // 16, 64)
    return -(-max(count, 1) // step) * step


def _power_of_two(count: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << max(count - 1, 0).bit_length()


def host_memory(size: int, pinned: bool = False) -> Tensor:
    """Unwritten host memory, uint8 [size]."""
    return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned)


def default_limit() -> int:
    """Bytes of host memory that this process may use for offloaded tensors: FXFUSE_HOST_MEMORY, or half of what is available now,
    shared with the other processes of a job on this machine.
    """
    if os.environ.get(LIMIT_VARIABLE, "").strip() == "0":
        return 0
    available = available_host_bytes() // max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    asked = parse_budget(_number(os.environ.get(LIMIT_VARIABLE)))
    if asked is None or asked.auto:
        return int(_SHARE * available)
    return int(asked.fraction * available) if asked.fraction is not None else asked.bytes or 0


def _number(text: str | None) -> float | str | None:
    """An environment variable's text as ``parse_budget`` takes it: '0.25' is a fraction, '16GiB' a size."""
    try:
        return float(text) if text and "." in text else text or None
    except ValueError:
        return text


def available_host_bytes() -> int:
    """What the system says can still be allocated on the host, inside the limits of a container."""
    limits = [_available_to_system()]
    for total, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        total_path, used_path = Path("/sys/fs/cgroup", total), Path("/sys/fs/cgroup", used)
        if total_path.is_file() and used_path.is_file() and (text := total_path.read_text().strip()).isdecimal():
            limits.append(max(int(text) - int(used_path.read_text()), 0))
    return min(limits)


def _available_to_system() -> int:
    path = Path("/proc/meminfo")
    for line in path.read_text().splitlines() if path.is_file() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return 4 << 30
