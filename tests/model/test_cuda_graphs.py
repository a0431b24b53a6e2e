"""Blocks that are recorded and replayed: the same losses and gradients as launched one by one, or launched one by one.

There is no GPU here. The recorder is an imagined one that does the worst a CUDA graph may do to memory (tests/imagined_capture.py).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse.cuda_graphs.places import Seen
from fxfuse.cuda_graphs.pool import Pool
from fxfuse.cuda_graphs.recording import Recording
from tests.imagined_capture import imagined
from tests.offloading import Stack as Blocks

WIDTH, DEPTH = 16, 3
Script = Callable[[nn.Module, torch.optim.Optimizer], Iterator[Tensor]]


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    with imagined(monkeypatch) as made:
        yield made


class Stack(nn.Module):
    """Blocks behind a layer that is trained, so that they all are one graph."""

    def __init__(self, depth: int = DEPTH) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.body = Blocks(depth, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.first(x))


def batch(index: int, rows: int = 6) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(index))


def fresh(cuda_graphs: bool, change: Callable[[nn.Module], object] = lambda model: None) -> nn.Module:
    torch.manual_seed(0)
    model = Stack()
    change(model)
    return fxfuse.optimize(model, cuda_graphs=cuda_graphs, validate="off")


def trained(script: Script, model: nn.Module) -> list[Tensor]:
    """What a script of training gives, and the weights that it ends with."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return [*script(model, optimizer), *(p.detach().clone() for p in model.parameters())]


def same(script: Script, **changes: Any) -> nn.Module:
    """The model after a script, which gave the same bits with CUDA graphs as without."""
    plain, recorded = fresh(False, **changes), fresh(True, **changes)
    for ours, theirs in zip(trained(script, recorded), trained(script, plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    return recorded


def told(model: nn.Module) -> str:
    """What the report says of the recordings."""
    return next(note for note in fxfuse.report(model).notes if note.startswith("CUDA graphs"))


def steps(count: int, rows: Callable[[int], int] = lambda index: 6, accumulate: int = 1, first: int = 0) -> Script:
    """Plain training steps, of so many batches each."""

    def script(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
        for index in range(first, first + count):
            for part in range(accumulate):
                loss = model(batch(accumulate * index + part, rows(index))).square().mean()
                loss.backward()
                yield loss.detach()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return script


def test_steps_are_replayed_and_give_the_same_bits(pool: Pool) -> None:
    model = same(steps(6))
    # Forwards are recorded in the second step, backwards in the third; all are replayed when they have been recorded.
    assert told(model) == f"CUDA graphs of Block: {2 * DEPTH} recorded, {DEPTH * (5 + 4)} replays"


def test_accumulated_gradients_outlive_the_replays_that_follow(pool: Pool) -> None:
    model = same(steps(4, accumulate=3))
    assert "because" not in told(model)


def test_gradients_that_are_zeroed_in_place(pool: Pool) -> None:
    def script(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
        for index in range(5):
            model(batch(index)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            yield next(model.parameters()).detach().clone()

    assert "because" not in told(same(script))


def test_each_length_has_recordings_up_to_a_bound(pool: Pool) -> None:
    model = same(steps(18, rows=lambda index: 3 + index % 6))
    assert "recordings for 4 sizes" in told(model)
    assert f"{2 * 4 * DEPTH} recorded" in told(model)


def test_evaluation_between_steps(pool: Pool) -> None:
    def script(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
        for index in range(4):
            yield from steps(1, first=index)(model, optimizer)
            with torch.no_grad():
                yield model(batch(100 + index))

    assert "because" not in told(same(script))


def test_a_second_forward_before_the_backward_runs_one_by_one(pool: Pool) -> None:
    def script(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
        for index in range(5):
            chosen, rejected = model(batch(2 * index)), model(batch(2 * index + 1))
            loss = (chosen.square() - rejected.square()).mean().exp()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield loss.detach()

    assert "still in use" in told(same(script))


def test_outputs_that_are_kept_are_not_overwritten(pool: Pool) -> None:
    def script(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
        kept = []
        for index in range(6):
            kept.append(model(batch(index)).detach())  # the same memory as the output's
            yield from steps(1, first=50 + index)(model, optimizer)
        yield from kept

    assert "still in use" in told(same(script))


def test_a_graph_of_a_forward_that_is_kept_for_a_second_backward(pool: Pool) -> None:
    def script(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
        for index in range(6):
            loss = model(batch(index)).square().mean()
            loss.backward(retain_graph=True)
            loss.backward()
            optimizer.step()
            yield next(model.parameters()).grad.clone()  # type: ignore[union-attr]
            optimizer.zero_grad()

    same(script)


def test_a_forward_without_a_backward(pool: Pool) -> None:
    def script(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
        for index in range(6):
            abandoned = model(batch(60 + index))
            yield from steps(1, first=index)(model, optimizer)
            yield abandoned.detach()

    same(script)


def test_weights_that_move_are_read_where_they_are(pool: Pool) -> None:
    def script(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
        for index in range(8):
            yield from steps(1, first=index)(model, optimizer)
            if index == 3:
                for parameter in model.parameters():
                    parameter.data = parameter.data.clone() * 2

    assert "did not lie where" in told(same(script))


def test_a_batch_that_is_the_same_tensor_for_some_steps(pool: Pool) -> None:
    fixed = batch(7)

    def script(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
        for index in range(12):
            loss = model(fixed if index < 4 else batch(index)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield loss.detach()

    model = same(script)
    assert "did not lie where" in told(model)


def test_frozen_weights_and_a_frozen_bottom(pool: Pool) -> None:
    def freeze(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith("body.blocks.0.") and "norm" in name)

    same(steps(5), change=freeze)


def test_checkpointed_blocks(pool: Pool) -> None:
    from torch.utils.checkpoint import checkpoint

    def script(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
        for index in range(6):
            x = batch(index).requires_grad_()
            for block in model.body.blocks:  # type: ignore[union-attr]
                x = checkpoint(block, x, use_reentrant=False)
            loss = x.square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield loss.detach()

    same(script)


def test_recordings_go_with_the_model_and_with_restore(pool: Pool) -> None:
    model = same(steps(4))
    del model
    gc.collect()
    pool.forget_unheld()
    assert not pool._owners
    model = same(steps(4))
    assert pool._owners
    fxfuse.restore(model)
    pool.forget_unheld()
    assert not pool._owners


@pytest.mark.parametrize(
    ("owner", "name", "fault"),
    [
        (Pool, "may_run", lambda self, recording: True),
        (Recording, "fits", lambda self, arguments: True),
        (Seen, "lasted", lambda self, arguments: [i for i, a in enumerate(arguments) if isinstance(a, Tensor)]),
    ],
)
def test_a_fault_is_seen(pool: Pool, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, fault: Callable) -> None:
    def script(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
        kept = []
        for index in range(4):
            kept.append(model(batch(index)).detach())
            yield from steps(1, first=50 + index)(model, optimizer)
            if index == 2:
                for parameter in model.parameters():
                    parameter.data = parameter.data.clone() * 2
        yield from kept

    monkeypatch.setattr(owner, name, fault)
    with pytest.raises(AssertionError):
        same(script)


def test_gradients_that_lie_in_a_recording_would_be_seen(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Recording.__init__
    monkeypatch.setattr(Recording, "__init__", lambda self, *args, **options: original(self, *args, **{**options, "fresh": ()}))
    model = fresh(True)
    trained(steps(4, accumulate=2), model)
    assert "still in use" in told(model)


def test_what_draws_random_numbers_is_not_recorded(pool: Pool) -> None:
    def drop(model: nn.Module) -> None:
        for block in model.body.blocks:  # type: ignore[union-attr]
            block.down = nn.Sequential(block.down, nn.Dropout(0.1))

    model = fresh(True, change=drop)
    trained(steps(3), model)
    assert "draws random numbers" in told(model)
    assert " 0 recorded" in told(model)


def test_a_recording_that_fails_is_not_tried_again(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any, run: Any, inputs: list) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(type(pool.capture), "__call__", fails)
    model = same(steps(4))
    assert "recording failed: operation not permitted when stream is capturing" in told(model)


def test_inside_a_recording_of_somebody_else_nothing_is_replayed(pool: Pool) -> None:
    pool.capture.busy = "a CUDA graph around it was being recorded"  # type: ignore[attr-defined]
    assert "a CUDA graph around it" in told(same(steps(3)))


@pytest.mark.parametrize("options", [dict(memory="1GiB"), dict(remainder="inductor"), dict(cuda_graphs="yes")])
def test_what_does_not_go_together_is_said(options: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match="cuda_graphs"):
        fxfuse.optimize(Stack(), **{"cuda_graphs": True, **options})
