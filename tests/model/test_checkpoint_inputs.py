"""What a checkpoint keeps of a captured block goes to the host: the same bits, one input on its way at a time, nothing else moved."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxfuse
from fxfuse.capture import checkpoint_inputs
from fxfuse.memory import host_pool
from fxfuse.memory.offload_runtime import Transfers
from tests.model.builders import llama
from tests.offloading import Late, traffic

LAYERS, WIDTH = 2, 32
IDS = torch.arange(32).reshape(2, 16)


@pytest.fixture
def transfers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Transfers]:
    """A CPU that passes for a device with memory of its own, whose copies are as late as they may be."""
    monkeypatch.setattr(checkpoint_inputs, "DEVICES", ("cpu",))
    monkeypatch.setattr(checkpoint_inputs, "LEAST_BYTES", 1)
    with traffic(monkeypatch, Late()) as ours:
        monkeypatch.setattr(checkpoint_inputs, "transfers", lambda device: ours)
        yield ours


def checkpointed(**kwargs: Any) -> nn.Module:
    model = fxfuse.optimize(llama(layers=LAYERS))
    model.gradient_checkpointing_enable({"use_reentrant": False, **kwargs})
    return model.train()


def gradients(model: nn.Module, steps: int = 2) -> list[Tensor]:
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def test_gradients_are_the_same_bits(transfers: Transfers, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = gradients(checkpointed())
    transfers.copies.finish()
    assert not transfers.copies.faults
    sent, in_use = transfers.counts, transfers.pool.in_use()
    assert (sent.sent, sent.handed_back, sent.prefetched, sent.late) == (2 * LAYERS, 2, 2 * (LAYERS - 1), 0)
    assert in_use == 0
    monkeypatch.setattr(checkpoint_inputs, "DEVICES", ())
    plain = gradients(checkpointed())
    assert transfers.counts.sent == 2 * LAYERS
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_a_device_that_does_not_wait_is_found_out(transfers: Transfers, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = gradients(checkpointed(), steps=1)
    monkeypatch.setattr(transfers.copies, "waits", False)
    assert not all(torch.equal(a, b) for a, b in zip(plain, gradients(checkpointed(), steps=1), strict=True))


def test_one_input_is_on_its_way_at_a_time(transfers: Transfers) -> None:
    model, held = checkpointed(), []
    for block in model.model.layers:
        block.register_forward_hook(lambda *_: held.append(transfers.held_bytes()))
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    one = IDS.numel() * model.config.hidden_size * 4
    assert held == LAYERS * [one]
    assert transfers.pool.in_use() == LAYERS * one
    del loss
    transfers.copies.finish()
    assert transfers.pool.in_use() == 0


def test_the_graph_can_be_walked_twice(transfers: Transfers) -> None:
    model = checkpointed()
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    parameters = list(model.parameters())
    first, second = (torch.autograd.grad(loss, parameters, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_checkpoints_with_reentry_keep_what_they_keep(transfers: Transfers) -> None:
    gradients(checkpointed(use_reentrant=True), steps=1)
    assert transfers.counts.sent == 0


def test_without_checkpoints_nothing_moves(transfers: Transfers) -> None:
    _, model = twins()
    model.all = lambda x, mask: [x := block(x, mask) for block in model.blocks][-1]
    model(torch.randn(4, 8, WIDTH), torch.rand(4, 8, 1)).sum().backward()
    assert transfers.counts.sent == 0


def test_hooks_of_somebody_else_keep_their_tensors(transfers: Transfers) -> None:
    model, seen = checkpointed(), []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    assert seen
    assert transfers.counts.sent == 0


class Block(nn.Module):
    """Two matrices, and an argument besides the block's own input."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.up(x)) * mask)


class Stack(nn.Module):
    """Blocks under checkpoints, and what may happen to the input of one meanwhile."""

    def __init__(self, nested: bool = False, spoiled: bool = False) -> None:
        super().__init__()
        self.embed, self.nested, self.spoiled = nn.Linear(WIDTH, WIDTH), nested, spoiled
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(x)
        run = partial(checkpoint, self.all, use_reentrant=False) if self.nested else self.all
        return run(x, mask)

    def all(self, x: Tensor, mask: Tensor) -> Tensor:
        for block in self.blocks:
            before, x = x, checkpoint(block, x, mask, use_reentrant=False)
            if self.spoiled:
                before.mul_(2)
        return x


def twins(**kwargs: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = Stack(**kwargs)
    return copy.deepcopy(model), fxfuse.optimize(model)


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_masks_stay_and_nested_checkpoints_agree(transfers: Transfers, nested: bool) -> None:
    eager, ours = twins(nested=nested)
    x, mask = torch.randn(4, 8, WIDTH), torch.rand(4, 8, 1)
    for model in (eager, ours):
        model(x, mask).square().sum().backward()
    for a, b in zip(ours.parameters(), eager.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-5 * b.grad.norm()
    if not nested:
        assert transfers.counts.sent_bytes == LAYERS * x.nbytes


@pytest.mark.parametrize("room", [1 << 24, 1], ids=["sent", "stayed"])
def test_an_input_written_over_is_an_error_as_in_eager(transfers: Transfers, room: int) -> None:
    transfers.pool.limit = room
    for model in twins(spoiled=True):
        out = model(torch.randn(4, 8, WIDTH), torch.rand(4, 8, 1))
        with pytest.raises(RuntimeError, match="modified by an inplace"):
            out.sum().backward()


def test_a_mask_written_over_is_an_error_as_in_eager(transfers: Transfers) -> None:
    for model in twins():
        mask = torch.rand(4, 8, 1)
        out = model(torch.randn(4, 8, WIDTH), mask)
        mask.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace"):
            out.sum().backward()


def test_no_host_memory_is_asked_for_by_nobody(transfers: Transfers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(host_pool.LIMIT_VARIABLE, "0")
    transfers.pool.limit = host_pool.default_limit()
    _, model = twins()
    model(torch.randn(4, 8, WIDTH), torch.rand(4, 8, 1)).sum().backward()
    assert (transfers.counts.sent, sum(transfers.counts.kept.values()), transfers.pool.bytes) == (0, 0, 0)


def test_a_row_that_travels_longer_than_the_block_works_on_it_stays(transfers: Transfers) -> None:
    block, rates = Block(), checkpoint_inputs.rates_of(torch.device("cpu"))
    x = torch.randn(4, 8, WIDTH, requires_grad=True)
    assert checkpoint_inputs._is_hidden(block, x)
    thin = nn.Linear(WIDTH, 1)
    assert not checkpoint_inputs._is_hidden(thin, x)
    works = 2 * sum(p.numel() for p in block.parameters() if p.dim() == 2) / rates.product
    assert WIDTH * 4 / rates.to_host <= checkpoint_inputs.FREE * works


def test_memory_for_the_blocks_to_come_is_there_before_they_come() -> None:
    asked: list[int] = []
    ours = host_pool.HostPool(lambda size: asked.append(size) or host_pool.host_memory(size), 1 << 20)
    leases = [ours.take(1000)]
    ours.expect(1000, 11).join()
    allocated = list(asked)
    leases += [ours.take(1000) for _ in range(11)]
    assert asked == allocated
    assert ours.bytes == sum(asked)
    assert None not in leases
    ours.limit = ours.bytes + 100
    ours.expect(1000, 4).join()  # no more than the limit leaves
    assert asked == allocated


def test_it_is_looked_for_once_for_blocks_of_a_kind(transfers: Transfers, monkeypatch: pytest.MonkeyPatch) -> None:
    expected: list[tuple[int, int]] = []
    monkeypatch.setattr(transfers.pool, "expect", lambda count, buffers: expected.append((count, buffers)))
    model = checkpointed()
    gradients(model)
    assert expected == [(IDS.numel() * model.config.hidden_size * 4, LAYERS - 1)]
