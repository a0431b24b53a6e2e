"""Saved tensors on the host, on a GPU: less memory, the same bits, and copies that computation hides."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Tensor

from fxfuse.memory.offload_runtime import Transfers, host_pool, transfers
from tests.offloading import Stack, compiled_blocks

DEPTH, WIDTH = 8, 2048
DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    """Not after each test: the graphs of ``model`` serve them all."""


@pytest.fixture(autouse=True, scope="module")
def graphs_shared() -> Iterator[None]:
    yield
    model.cache_clear()
    torch.compiler.reset()
    torch.cuda.empty_cache()


@pytest.fixture
def traffic() -> Iterator[Transfers]:
    """That of the device, quiet before and after."""
    torch.compiler.reset()  # the blocks of all tests are one code object, of which Dynamo makes eight graphs and no more
    ours = transfers(DEVICE)
    ours.clear()
    yield ours
    ours.clear()
    gc.collect()
    assert ours.held_bytes() == 0
    assert ours.pool.in_use() == 0


@cache
def model(offload: bool, recompute: bool) -> Stack:
    torch.manual_seed(1)
    with torch.device(DEVICE):
        stack = Stack(DEPTH, WIDTH).bfloat16()
    return compiled_blocks(stack, offload=offload, recompute=recompute)


def batch(rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(4, rows, WIDTH, device=DEVICE, dtype=torch.bfloat16, generator=generator)


def step(stack: Stack, x: Tensor) -> Tensor:
    """One forward and backward."""
    value = stack(x).float().square().mean()
    value.backward()
    return value


def gradients(stack: Stack) -> list[Tensor]:
    found = [p.grad for p in stack.parameters() if p.grad is not None]
    stack.zero_grad()
    assert found
    return found


def peak(stack: Stack, rows: int) -> int:
    """Bytes beyond those there at the start, in a second step; with frozen weights, or their gradients would hide what is saved."""
    stack.requires_grad_(False)
    for seed in range(2):
        x = batch(rows, seed).requires_grad_()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(stack, x)
    stack.requires_grad_(True)
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
def test_gradients_are_the_same_bits(traffic: Transfers, recompute: bool) -> None:
    """Over steps of changing sizes, so that memory that was freed too early would be somebody else's."""
    for seed, rows in enumerate((512, 1024, 384, 1024, 77, 1024)):
        for offload in (True, False):
            step(model(offload, recompute), batch(rows, seed))
    ours, plain = (gradients(model(offload, recompute)) for offload in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    assert traffic.counts.sent > 0


def test_gradients_are_the_same_bits_while_the_device_lags(traffic: Transfers) -> None:
    """The host is steps ahead; copies out wait behind one another."""
    for offload in (True, False):
        torch.cuda._sleep(500_000_000)
        for seed in range(3):
            losses = [model(offload, False)(batch(512, seed + i)).float().square().mean() for i in range(2)]
            losses[seed % 2].backward(retain_graph=True)
            sum(losses).backward()
    ours, plain = (gradients(model(offload, False)) for offload in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_on_another_stream_and_after_an_exception(traffic: Transfers) -> None:
    stack = model(True, True)
    with torch.cuda.stream(torch.cuda.Stream()):
        middle = stack.blocks[1](stack.blocks[0](batch(512)))
        middle.register_hook(_fail)
        with pytest.raises(ZeroDivisionError):
            stack.blocks[3](stack.blocks[2](middle)).sum().backward()
        del middle
        stack.zero_grad()
        for seed in range(3):
            step(stack, batch(512, seed))
        torch.cuda.current_stream().synchronize()
    for seed in range(3):
        step(model(False, True), batch(512, seed))
    ours, plain = (gradients(model(offload, True)) for offload in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def _fail(_: Tensor) -> None:
    raise ZeroDivisionError


def test_the_peak_drops_by_the_inputs_of_all_blocks_but_two(traffic: Transfers) -> None:
    """One input is leaving or arriving while another is used; the first block's belongs to the caller."""
    ours, plain = peak(model(True, True), 2048), peak(model(False, True), 2048)
    inputs = 4 * 2048 * WIDTH * 2
    assert plain - ours >= (DEPTH - 3) * inputs - (2 << 20)
    assert traffic.counts.kept_bytes == 0


def test_the_pool_is_filled_once(traffic: Transfers) -> None:
    pool = host_pool(True)
    step(model(True, False), batch(1024))
    filled = pool.bytes
    for seed in range(5):
        step(model(True, False), batch(1024, seed))
    assert pool.bytes == filled <= pool.limit


def test_computation_hides_the_copies(traffic: Transfers) -> None:
    """Inputs of blocks alone: 64 MiB each way a block, beside 3 ms of products."""
    x = batch(4096)
    times = {}
    for offload in (False, True, False, True):
        stack = model(offload, True)
        step(stack, x)
        before = traffic.counts.late
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(5):
            step(stack, x)
        end.record()
        end.synchronize()
        assert traffic.counts.late == before
        times[offload] = min(start.elapsed_time(end) / 5, times.get(offload, float("inf")))
        stack.zero_grad()
    copied_ms = 2 * DEPTH * x.numel() * x.element_size() / 50e9 * 1e3
    assert times[True] - times[False] < 0.25 * copied_ms


def test_memory_is_not_used_again_too_early(traffic: Transfers) -> None:
    """The device lags; what is freed on the host's clock is filled with something else at once."""
    kept = []
    torch.cuda._sleep(300_000_000)
    for i in range(24):
        tensor = torch.full((1 << 22,), float(i), device=DEVICE)
        kept.append([traffic.send(tensor, rank, 2) for rank in range(2)])
        del tensor
        torch.full((1 << 22,), float("nan"), device=DEVICE)
    while kept:
        for saved in kept.pop():
            back = traffic.take(saved)
            torch.full((1 << 22,), float("nan"), device=DEVICE)
            assert (back == len(kept)).all()
    assert traffic.counts.kept_bytes == 0


def test_parts_of_one_memory_come_back_together(traffic: Transfers) -> None:
    kept, before = [], traffic.counts.sent_bytes
    for i in range(4):
        whole = torch.full((1024, 3072), float(i), device=DEVICE).mul_(torch.arange(3072, device=DEVICE))
        parts = [part.view(1024, 8, 128).transpose(0, 1) for part in whole.split(1024, dim=1)]
        kept.append([traffic.send(part, 0, 1, False, whole, number, 3) for number, part in enumerate(parts)])
        del whole, parts
    assert traffic.counts.sent_bytes - before == 4 * 1024 * 3072 * 4
    while kept:
        back = [traffic.take(part) for part in kept.pop()]
        columns = torch.arange(3072.0, device=DEVICE).view(3, 8, 1, 128) * len(kept)
        assert all(torch.equal(part, columns[i].expand(8, 1024, 128)) for i, part in enumerate(back))
        assert len({part.untyped_storage().data_ptr() for part in back}) == 1
