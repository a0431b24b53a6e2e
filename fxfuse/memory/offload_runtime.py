"""Tensors on their way to the host and back, while a model runs.

A *group* is what one execution of a forward graph sends out: the tensors that its backward will want, each with its rank, its place in
the order in which the backward wants them. Groups of a device stand in a list, oldest first; backwards want them newest first.

Out:  the copy starts when the tensor is made. Its device memory is held until the tensor of the same place in the *next* group
      goes out; there the compute stream waits for the copy, which has had a whole block's time, and the memory is free for
      whatever comes next. No more than one group is ever leaving, and the allocator sees frees in the order of one stream
      (``record_stream`` would hold memory for as long as the host is ahead of the device).
Back: what the backward takes first, the last group, has not left the device yet, and is handed back as it is. Each tensor that is taken
      lets the one that will be wanted a whole group later start on its way.

A group is alive while autograd holds one of its tensors (host_pool.py). Dead ones are passed over, so a step that ended in an
exception, was never differentiated, or is differentiated twice needs no special care.
"""

from __future__ import annotations

import logging
import threading
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import islice

import torch
from torch import Tensor

from .._torch import top_saved_tensors_hooks
from .host_pool import HostPool, Lease, host_memory
from .offload_entry import Entry, Group, extent_of, flat, lies_in
from .offload_streams import Copies, copies_of
from .plan import size_text

logger = logging.getLogger("fxfuse")

# Memory between the elements of a tensor is copied along; a tensor with more than this of it stays where it is.
_SPARSEST = 1.25
_PRUNE_AT = 256  # groups, alive or dead, before dead ones are looked for among all


@dataclass
class Counts:
    """What happened to offloaded tensors of one device since the start. ``kept``: stayed on the device, by reason."""

    sent: int = 0
    sent_bytes: int = 0
    kept: Counter[str] = field(default_factory=Counter)
    kept_bytes: int = 0
    handed_back: int = 0  # wanted before their device memory was let go
    prefetched: int = 0  # on their way back when they were wanted
    late: int = 0  # sent for when they were wanted

    def __str__(self) -> str:
        lines = [f"offloaded {self.sent} tensors ({size_text(self.sent_bytes)} in all); came back: {self.prefetched} ahead of time, "
                 f"{self.late} late, {self.handed_back} had not left"]  # fmt: skip
        lines += [f"{count} stayed on the device: {reason}" for reason, count in sorted(self.kept.items())]
        return "; ".join(lines)


class Transfers:
    """The traffic of one device."""

    def __init__(self, device: torch.device, copies: Copies, pool: HostPool) -> None:
        self.device = device
        self.copies = copies
        self.pool = pool
        self.counts = Counts()
        self._groups: list[Group] = []
        self._alive_at_prune = 0
        self._leaving: deque[Entry] = deque()
        self._arriving: list[Entry] = []
        self._shared: list[Entry] = []
        self._started = 0
        self._open = threading.local()  # the group that this thread's forward is filling
        self._lock = threading.RLock()

    def send(self, tensor: Tensor, rank: int, count: int, watched: bool = False, whole: Tensor | None = None, part: int = 0,
             parts: int = 1, hooked: bool = False) -> Tensor:  # fmt: skip
        """The tensor's place on the host, to which it is being copied; or the tensor itself, where it stays on the device.

        rank, count: its place among the tensors that this execution of the graph sends
        watched:     others than the graph hold the tensor and could write to it; that is an error in the backward, as in eager
        whole:       what is copied in its place, and has ``parts`` views such as this one; it goes with the first, ``part`` 0
        hooked:      the caller is the hook that packs this tensor; other hooks that are set then do not concern it
        """
        whole = tensor if whole is None else whole
        with self._lock:
            lease = self._send(whole, rank, count, watched, parts, hooked) if part == 0 else None
            group = getattr(self._open, "group", None)
            entry = None if group is None else group.entries.get(rank)
            if entry is not None and entry.is_leaving_from(whole) and (tensor is whole or lies_in(tensor, whole)):
                tensor = entry.on_host(tensor, whole)
            del lease  # from here on the result keeps the buffer
            return tensor

    def _send(self, tensor: Tensor, rank: int, count: int, watched: bool, parts: int, hooked: bool) -> Lease | None:
        reason = "a CUDA graph is recorded" if self.copies.is_recording() else _why_stay(tensor, hooked)
        lease = None if reason else self.pool.take(extent_of(tensor) * tensor.element_size())
        group = self._group(rank, count)
        if lease is None:
            self._keep(tensor, reason or "the pool of host memory is full")
            return None
        buffer = lease.buffer
        entry = Entry(group, rank, buffer, tensor, parts, watched, self.copies.stream())
        group.entries[rank] = buffer.owner = entry
        entry.left = buffer.written = self.copies.send(flat(tensor, entry.extent), buffer, entry.flat_on_host())
        self._leaving.append(entry)
        while len(self._leaving) > self._together(group):
            self._let_leave(self._leaving.popleft())
        self.counts.sent += 1
        self.counts.sent_bytes += entry.extent * tensor.element_size()
        return lease

    def take(self, kept: Tensor) -> Tensor:
        """What ``send`` was given, on the device again, from what it returned."""
        with self._lock:
            buffer = self.pool.find(kept)
            entry = None if buffer is None else buffer.owner
            if entry is None:
                return kept if kept.device == self.device else _moved(kept, self.device)
            for other in [e for e in self._leaving if e.group is not entry.group]:
                self._leaving.remove(other)
                self._let_leave(other)
            memory = self._in_memory(entry) if entry.shared is None else entry.shared
            if not entry.intact:
                raise RuntimeError(
                    f"a {entry.dtype} tensor of shape {entry.size} that is kept on the host for the backward was modified by an "
                    "inplace operation while it was copied there, so a gradient cannot be computed; clone it before it is modified")
            self._look_ahead(entry)
            return memory if entry.parts == 1 else self._part(entry, memory, kept)

    def _part(self, entry: Entry, memory: Tensor, kept: Tensor) -> Tensor:
        """One of several views of what came back, which is held here until all are taken."""
        if entry.shared is None:
            entry.shared, entry.missing = memory, entry.parts
            self._shared.append(entry)
        entry.missing -= 1
        if entry.missing == 0:
            entry.shared = None
            self._shared.remove(entry)
        offset = memory.storage_offset() + kept.storage_offset()
        return torch.empty(0, dtype=entry.dtype, device=self.device).set_(memory.untyped_storage(), offset, kept.size(), kept.stride())

    def clear(self) -> None:
        """Let go of all device memory held here. What is alive is on the host, and comes back when it is wanted."""
        with self._lock:
            while self._leaving:
                self._let_leave(self._leaving.popleft())
            self._discard(list(self._arriving))
            self._let_go_of_shared(self._shared)
            self._groups = [group for group in self._groups if group.is_alive()]

    def held_bytes(self) -> int:
        """Device memory held by tensors that are leaving or arriving."""
        return sum(entry.extent * entry.dtype.itemsize for entry in (*self._leaving, *self._arriving, *self._shared))

    def _keep(self, tensor: Tensor, reason: str) -> None:
        if not self.counts.kept[reason] and reason.startswith("the pool"):
            logger.warning("%s (%s): tensors that should be offloaded stay on %s", reason, size_text(self.pool.limit), tensor.device)
        self.counts.kept[reason] += 1
        self.counts.kept_bytes += tensor.numel() * tensor.element_size()

    def _group(self, rank: int, count: int) -> Group:
        """The group that this thread's forward fills, a new one if this cannot be the last one."""
        group = getattr(self._open, "group", None)
        if group is None or group.count != count or rank in group.seen:
            self._prune()
            group = self._open.group = Group(self._started, count)
            self._started += 1
            self._groups.append(group)
        group.seen.add(rank)
        return group

    def _together(self, group: Group) -> int:
        """How many tensors go at once. Some may stay on the device: of the group before, if it was like this one, that is known."""
        before = self._groups[-2] if len(self._groups) > 1 else group
        return len(before.entries) if before is not group and before.count == group.count and before.entries else group.count

    def _prune(self) -> None:
        self._let_go_of_shared([entry for entry in self._shared if not entry.is_alive()])
        while self._groups and not self._groups[-1].is_alive():
            self._groups.pop()
        if len(self._groups) > _PRUNE_AT + 2 * self._alive_at_prune:
            self._groups = [group for group in self._groups if group.is_alive()]
            self._alive_at_prune = len(self._groups)

    def _let_leave(self, entry: Entry) -> None:
        self.copies.wait(entry.stream, entry.left)
        entry.let_go()

    def _in_memory(self, entry: Entry) -> Tensor:
        """The entry's tensor on the device, no longer held here."""
        if entry.source is not None:
            self._leaving.remove(entry)
            self.copies.wait(entry.stream, entry.left)  # the memory may be written to soon, and the host's copy wanted again
            self.counts.handed_back += 1
            memory = entry.let_go()
        else:
            if entry.arrived is None:
                self.counts.late += 1
                self._fetch(entry)
            else:
                self.counts.prefetched += 1
            memory = self._arrived(entry)
        assert memory is not None
        stream = self.copies.stream()
        if stream != entry.stream:
            self.copies.lend(memory, stream)
        entry.taken = True
        return memory

    def _arrived(self, entry: Entry) -> Tensor | None:
        """Memory that an entry was fetched into, once it is there."""
        self._arriving.remove(entry)
        memory, entry.arrived = entry.arrived, None
        for stream in {entry.stream, self.copies.stream()}:
            self.copies.wait(stream, entry.arrival)
        return memory

    def _fetch(self, entry: Entry) -> None:
        entry.arrived = torch.empty_strided(entry.size, entry.stride, dtype=entry.dtype, device=self.device)
        entry.stream, entry.taken = self.copies.stream(), False
        target = flat(entry.arrived, entry.extent)
        entry.arrival = entry.buffer.read = self.copies.fetch(entry.buffer, entry.flat_on_host(), target)
        self._arriving.append(entry)

    def _look_ahead(self, entry: Entry) -> None:
        """Send for what will be wanted soonest, as many as this group has; give up what is not among it."""
        soon = list(islice(self._following(entry), len(entry.group.entries)))
        self._discard([other for other in self._arriving if other not in soon])
        for other in soon:
            if other.source is None and other.arrived is None:
                self._fetch(other)

    def _following(self, entry: Entry) -> Iterator[Entry]:
        """Living entries in the order in which backwards take them: the rest of this group, then one older group, no more at a time."""
        group = entry.group
        yield from (other for _, other in sorted(group.entries.items()) if other is not entry and not other.taken and other.is_alive())
        for position in range(bisect_left(self._groups, group.number, key=lambda g: g.number) - 1, -1, -1):
            living = [other for _, other in sorted(self._groups[position].entries.items()) if other.is_alive()]
            if living:
                yield from living
                return

    def _let_go_of_shared(self, entries: list[Entry]) -> None:
        for entry in entries:
            entry.shared = None
        self._shared = [entry for entry in self._shared if entry.shared is not None]

    def _discard(self, entries: list[Entry]) -> None:
        for entry in entries:
            self._arrived(entry)


def _why_stay(tensor: Tensor, hooked: bool) -> str:
    """Why a tensor is not sent out, or nothing."""
    if not hooked and top_saved_tensors_hooks(True) is not None:
        # Somebody else packs what is saved, and would read the host's copy while it is being written. A checkpoint drops it anyway.
        return "hooks on saved tensors are set"
    if extent_of(tensor) > _SPARSEST * tensor.numel():
        return "its elements lie too far apart"
    if tensor.is_conj() or tensor.is_neg():
        return "it is a conjugate that is computed when it is read"
    return "it is empty" if tensor.numel() == 0 else ""


def _moved(kept: Tensor, device: torch.device) -> Tensor:
    """A tensor from the host that this process did not send out itself."""
    return torch.empty_strided(kept.size(), kept.stride(), dtype=kept.dtype, device=device).copy_(kept)


_all: dict[torch.device, Transfers] = {}
_all_lock = threading.Lock()


def transfers(device: torch.device) -> Transfers:
    """The traffic of a device (with its index)."""
    if device not in _all:
        with _all_lock:
            if device not in _all:
                _all[device] = Transfers(device, copies_of(device), host_pool(device.type == "cuda"))
    return _all[device]


@cache
def host_pool(pinned: bool) -> HostPool:
    """The pool of host memory: one for all CUDA devices of the process, and one, not pinned, for the rest."""
    return HostPool(partial(host_memory, pinned=pinned))


def release() -> None:
    """Let go of device memory held for tensors under way, and of host memory that none is in."""
    for ours in _all.values():
        ours.clear()
        ours.pool.release()


def told() -> list[str]:
    """A line for a report on each device that tensors were to be offloaded from, in this process, until now."""
    return [f"{device}: {ours.counts}; host memory for it {size_text(ours.pool.bytes)}, at most {size_text(ours.pool.limit)}"
            for device, ours in _all.items() if ours.counts.sent or ours.counts.kept]
