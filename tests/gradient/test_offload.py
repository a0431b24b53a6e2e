"""Gradients are the same bits wherever saved tensors were in between, however steps are put together and however they end."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fxfuse.memory.offload_runtime import Transfers

from ..offloading import Late, Stack, compiled_blocks, traffic

DEPTH, WIDTH = 4, 8


@pytest.fixture
def device() -> Late:
    return Late()


@pytest.fixture(autouse=True)
def transfers(device: Late, monkeypatch: pytest.MonkeyPatch) -> Iterator[Transfers]:
    """Copies as late as may be, over a pool that is empty again at the end."""
    with traffic(monkeypatch, device) as ours:
        yield ours
    device.finish()
    assert not device.faults
    ours.clear()
    assert ours.held_bytes() == 0


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    """Not after each test: the graphs of ``model`` serve them all."""


@pytest.fixture(autouse=True, scope="module")
def fresh_dynamo_at_the_end() -> Iterator[None]:
    yield
    model.cache_clear()
    torch.compiler.reset()


Step = Callable[[Stack], None]


@cache
def model(offload: bool, recompute: bool) -> Stack:
    """Equal parameters for all arguments."""
    torch.manual_seed(1)
    return compiled_blocks(Stack(DEPTH, WIDTH), offload=offload, recompute=recompute)


def gradients(step: Step, offload: bool, recompute: bool) -> list[Tensor]:
    """Of the parameters of a model after ``step``."""
    ours = model(offload, recompute)
    ours.zero_grad()
    step(ours)
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in ours.parameters()]


@pytest.fixture(params=[False, True], ids=["saved", "recomputed"])
def same(request: pytest.FixtureRequest) -> Callable[[Step], None]:
    """Asserts that a step gives the same gradients with tensors on the host as without."""

    def check(step: Step) -> None:
        ours, plain = (gradients(step, offload, request.param) for offload in (True, False))
        assert any(grad.any() for grad in plain)
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))

    return check


def batch(rows: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(2, rows, WIDTH, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def loss(stack: Stack, x: Tensor) -> Tensor:
    return stack(x).square().sum()


def test_steps_of_different_sizes(same: Callable, transfers: Transfers) -> None:
    def step(stack: Stack) -> None:
        for rows in (3, 7, 2, 7):
            loss(stack, batch(rows)).backward()

    same(step)
    assert transfers.counts.late == 0
    assert transfers.counts.prefetched > transfers.counts.handed_back > 0
    assert transfers.pool.in_use() == 0


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_several_forwards_before_their_backwards(same: Callable, order: tuple[int, ...]) -> None:
    def step(stack: Stack) -> None:
        losses = [loss(stack, batch(seed=seed)) for seed in range(3)]
        for i in order:
            losses[i].backward()

    same(step)


def test_forwards_and_backwards_in_turn(same: Callable) -> None:
    """As a pipeline has them: one more forward is always under way."""

    def step(stack: Stack) -> None:
        before = loss(stack, batch())
        for seed in range(1, 5):
            after = loss(stack, batch(seed=seed))
            before.backward()
            before = after
        before.backward()

    same(step)


def test_a_graph_that_is_kept(same: Callable) -> None:
    def step(stack: Stack) -> None:
        value = loss(stack, batch())
        for _ in range(2):
            value.backward(retain_graph=True)
        loss(stack, batch(seed=1)).backward()
        value.backward()

    same(step)


def test_evaluation_between_forward_and_backward(same: Callable, transfers: Transfers) -> None:
    def step(stack: Stack) -> None:
        value = loss(stack, batch())
        sent = transfers.counts.sent
        with torch.no_grad():
            loss(stack, batch(5))
        assert transfers.counts.sent == sent
        loss(stack, batch(5))  # with gradients, which nobody asks for
        value.backward()

    same(step)


def test_an_exception_in_a_forward(same: Callable, transfers: Transfers, device: Late) -> None:
    def step(stack: Stack) -> None:
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                fail(stack.blocks[1](stack.blocks[0](batch())))
        device.finish()  # copies that still wait hold buffers
        gc.collect()  # the tracebacks
        assert transfers.pool.in_use() == 0
        loss(stack, batch()).backward()

    same(step)


def test_an_exception_in_a_backward(same: Callable, transfers: Transfers, device: Late) -> None:
    def step(stack: Stack) -> None:
        for _ in range(2):
            middle = stack.blocks[1](stack.blocks[0](batch()))
            middle.register_hook(fail)
            with pytest.raises(ZeroDivisionError):
                stack.blocks[3](stack.blocks[2](middle)).sum().backward()
            del middle
        stack.zero_grad()
        device.finish()
        gc.collect()
        assert transfers.pool.in_use() == 0
        loss(stack, batch()).backward()

    same(step)


def fail(*_: object) -> None:
    raise ZeroDivisionError


def test_checkpointed_blocks_keep_theirs(same: Callable, transfers: Transfers) -> None:
    """What a checkpoint drops need not go anywhere, and what it computes again is needed at once."""

    def step(stack: Stack) -> None:
        x = batch()
        for block in stack.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        x.square().sum().backward()

    same(step)
    assert transfers.counts.sent == 0
    assert transfers.counts.kept["hooks on saved tensors are set"] > 0


def test_two_models_in_turn(same: Callable) -> None:
    def step(stack: Stack) -> None:
        other = copy.deepcopy(stack)
        first, second = loss(stack, batch()), loss(other, batch(4))
        second.backward()
        first.backward()
        loss(other, batch()).backward()
        loss(stack, other(batch())).backward()

    same(step)


def test_two_threads(same: Callable) -> None:
    """Graphs are compiled first; Dynamo is for one thread at a time."""

    def step(stack: Stack) -> None:
        models = [stack, copy.deepcopy(stack)]
        for each in models:
            loss(each, batch()).backward()
            each.zero_grad()
        failures: list[BaseException] = []

        def train(each: Stack, seed: int) -> None:
            try:
                for i in range(4):
                    loss(each, batch(seed=seed + i)).backward()
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=train, args=(each, seed)) for seed, each in enumerate(models)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures

    same(step)


def test_a_full_pool_leaves_tensors_on_the_device(same: Callable, transfers: Transfers, caplog: pytest.LogCaptureFixture) -> None:
    transfers.pool.limit = 3 << 8

    def step(stack: Stack) -> None:
        loss(stack, batch()).backward()

    same(step)
    assert transfers.pool.bytes <= 3 << 8
    assert transfers.counts.kept["the pool of host memory is full"] > 0
    assert transfers.counts.sent > 0
    assert [record.message.split(" (")[0] for record in caplog.records] == ["the pool of host memory is full"]


def test_writing_over_an_input_while_it_leaves_is_an_error(transfers: Transfers) -> None:
    """As in eager, where the saved tensor has another version by then."""
    blocks = model(True, True).blocks
    x = batch() * 1
    y = blocks[0](x)
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        blocks[1](y).sum().backward()


def test_writing_over_an_input_that_has_left_changes_nothing(transfers: Transfers) -> None:
    stack = model(True, True)
    x = batch() * 1
    y = stack.blocks[1](stack.blocks[0](x))
    with torch.no_grad():
        x.mul_(2)
    ours = torch.autograd.grad(stack.blocks[3](stack.blocks[2](y)).sum(), list(stack.parameters()))
    plain = torch.autograd.grad(stack(batch() * 1).sum(), list(stack.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_a_device_that_does_not_wait_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: were an event forgotten, these tests would see it."""
    careless = Late(waits=False)
    with traffic(monkeypatch, careless):
        ours = gradients(lambda stack: loss(stack, batch()).backward(), offload=True, recompute=True)
    assert any(grad.isnan().any() for grad in ours)
    careless.finish()
