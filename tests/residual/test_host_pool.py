"""Host memory that tensors leave into: how much of it there is, what is free, what is lost between sizes."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fxfuse.memory import host_pool
from fxfuse.memory.host_pool import HostPool, default_limit, host_memory


def pool(limit: int) -> HostPool:
    return HostPool(host_memory, limit)


def test_buffers_are_free_when_their_tensors_are_gone() -> None:
    ours = pool(1 << 12)
    first, second = ours.take(100), ours.take(128)
    assert first.buffer is not second.buffer
    tensors = [first.buffer.tensor(torch.float32, (25,), (1,)), second.buffer.tensor(torch.int8, (2, 5), (5, 1), 4).view(10)[3:]]
    buffers = [first.buffer, second.buffer]
    del first, second
    assert [ours.find(tensor) for tensor in tensors] == buffers
    assert (ours.bytes, ours.in_use()) == (512, 256)
    del tensors[1]
    assert ours.in_use() == 128
    assert ours.take(128).buffer is buffers[1]
    assert ours.bytes == 512


def test_free_pieces_are_cut_anew_before_memory_is_allocated() -> None:
    """As a longer sequence comes, whose tensors fit into no buffer that is there; copies that may still be under way are waited for."""
    ours, waited = pool(1 << 20), []
    first, held = [ours.take(128) for _ in range(4)], [ours.take(128) for _ in range(3)]
    assert ours.bytes == 1 << 10
    first[0].buffer.written = first[2].buffer.read = SimpleNamespace(synchronize=lambda: waited.append(1))
    where = first[0].tensor.data_ptr()
    del first
    longer = [ours.take(192) for _ in range(2)]
    assert longer[0].tensor.data_ptr() == where
    assert (len(waited), ours.bytes, ours.in_use()) == (2, 1 << 10, 3 * 128 + 2 * 192)
    assert ours.find(longer[1].tensor) is longer[1].buffer
    assert ours.find(held[2].tensor) is held[2].buffer
    assert ours.take(192).buffer.size == 192  # in a new piece: there is a tensor in each of the others
    assert ours.bytes == 2 << 10


def test_of_free_pieces_the_one_that_was_not_used_for_longest_is_cut_anew() -> None:
    """What the present step took and gave back is wanted again in the next."""
    ours = pool(1 << 20)
    old, present = [ours.take(128) for _ in range(4)], [ours.take(160) for _ in range(4)]
    places = [lease.tensor.data_ptr() for lease in present]
    again = [old.pop(0).tensor.data_ptr()]
    del old, present
    assert ours.take(400).tensor.data_ptr() == again[0]
    assert ours.take(160).tensor.data_ptr() in places


def test_tensors_outlive_their_pool() -> None:
    tensor = pool(1 << 20).take(1 << 16).buffer.tensor(torch.int32, (100,), (1,)).fill_(7)
    gc.collect()
    others = [torch.full((1 << 14,), 3, dtype=torch.int32) for _ in range(8)]
    assert tensor.sum() == 700
    assert len(others) == 8


def test_a_full_pool_gives_larger_buffers_and_replaces_what_is_free() -> None:
    ours = pool(1 << 10)
    small, large, other = ours.take(128), ours.take(256), ours.take(200)
    assert ours.bytes == 1 << 10
    assert ours.take(300) is None
    where = large.tensor.data_ptr()
    del large
    assert ours.take(140).tensor.data_ptr() == where
    assert ours.take(1 << 10) is None
    del small, other
    whole = ours.take(1 << 10)
    assert (whole.buffer.size, ours.bytes) == (1 << 10, 1 << 10)
    ours.limit = 64
    assert ours.bytes == 1 << 10  # in use
    del whole
    ours.release()
    assert ours.bytes == 0


@pytest.mark.parametrize("count", [1, 64, 1000, 296 << 20, 56 << 20, (64 << 20) + 1])
def test_little_memory_is_lost_between_sizes(count: int) -> None:
    """Of pieces, too: as many as are taken at once fill theirs."""
    pieces: list[int] = []

    def allocate(size: int) -> Tensor:
        pieces.append(size)
        return torch.empty(1, dtype=torch.uint8).expand(size)

    def cut(piece: Tensor, offset: int, size: int) -> object:
        return SimpleNamespace(size=size, is_free=lambda: False, storage=SimpleNamespace(data_ptr=lambda: 0), tensor=lambda *a: None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_pool, "Buffer", cut)
        ours = HostPool(allocate, 1 << 50)
        sizes = [ours.take(count).buffer.size for _ in range(28)]
    assert max(sizes) <= max(1.125 * count, 64)
    assert sum(pieces) <= 1.35 * 28 * max(count, 64)
    assert all(size & (size - 1) == 0 for size in pieces)  # torch rounds no further


def test_a_system_that_gives_no_more_sets_the_limit(caplog: pytest.LogCaptureFixture) -> None:
    def allocate(size: int) -> Tensor:
        if given:
            raise RuntimeError("out of pinned memory")
        given.append(size)
        return host_memory(size)

    given: list[int] = []
    ours = HostPool(allocate, 1 << 20)
    kept = [ours.take(64) for _ in range(4)]
    assert ours.take(64) is None
    assert ours.limit == sum(given) == 64 * len(kept)
    assert "out of pinned memory" in caplog.text


def test_the_limit_can_be_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXFUSE_HOST_MEMORY", "3MiB")
    assert default_limit() == 3 << 20
    monkeypatch.delenv("FXFUSE_HOST_MEMORY")
    half = default_limit()
    monkeypatch.setenv("FXFUSE_HOST_MEMORY", "0.25")
    assert default_limit() == pytest.approx(half / 2, rel=0.2)
    monkeypatch.setenv("FXFUSE_HOST_MEMORY", "much")
    with pytest.raises(ValueError, match="much"):
        default_limit()
