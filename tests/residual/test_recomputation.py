"""The user's checkpoints: a block that is run again in the backward computes what it saves, and no more.

Uninitialised memory is NaN in these tests, so an output that is read although it was not computed shows in every gradient.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

import fxfuse
from fxfuse.capture import dispatcher
from fxfuse.capture.tail_calls import returns_what_it_calls

BOTH = pytest.mark.parametrize("reentrant", [False, True], ids=["without reentry", "reentrant"])
WIDTH = 16


class Block(nn.Module):
    """Two projections and a gate; nothing needs the value of the second projection but who comes after."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 24, bias=False), nn.Linear(24, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(x)) * 2)


class Remembering(Block):
    """Leaves its result where others can read it."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x)
        return self.last


class Counting(Block):
    """Changes a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.seen.add_(out.detach().mean())
        return out


class Dropping(Block):
    """Random numbers before the last projection, and after it."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.dropout(F.silu(self.up(x)), 0.5, self.training)
        return x + F.dropout(self.down(hidden), 0.5, self.training)


class Stack(nn.Module):
    """Blocks under ``around``: how one of them is checkpointed."""

    def __init__(self, around: Callable[[nn.Module, Tensor], Tensor], block: type[nn.Module] = Block) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(3))
        self.around = around

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = self.around(block, x)
        return x


def data() -> Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))


def step(model: nn.Module, **settings: Any) -> list[Tensor]:
    """Loss and gradients of one step, from fixed random state."""
    model.zero_grad()
    torch.manual_seed(7)
    loss = model(data()).pow(2).mean()
    loss.backward(**settings)
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def left_out(model: nn.Module) -> list[str]:
    """What the report says of checkpoints."""
    return [note for note in fxfuse.report(model).notes if note.startswith("checkpointing:")]


def agree(got: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def compared(around: Callable, block: type[nn.Module] = Block) -> nn.Module:
    """An optimized stack whose second and third step were eager's."""
    wanted = step(Stack(around, block))
    model = fxfuse.optimize(Stack(around, block), strict=True)
    for _ in range(3):
        agree(step(model), wanted)
    return model


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


# --- when the output is not computed -------------------------------------------------------------------------


@BOTH
def test_a_checkpointed_module_is_recomputed_without_its_last_projection(reentrant: bool) -> None:
    model = compared(lambda block, x: checkpoint(block, x, use_reentrant=reentrant))
    assert left_out(model) == [
        "checkpointing: 3 Block blocks, recomputed without what only their output needs (1 of 2 matrix products)"
    ]


@BOTH
def test_so_is_one_that_a_function_returns_the_result_of(reentrant: bool) -> None:
    model = compared(lambda block, x: checkpoint(lambda y: block(y), x, use_reentrant=reentrant))
    assert left_out(model)


@BOTH
def test_random_numbers_are_drawn_as_in_the_first_run(reentrant: bool) -> None:
    compared(lambda block, x: checkpoint(block, x, use_reentrant=reentrant), Dropping)


@BOTH
def test_random_state_that_is_not_preserved_ends_where_eagers_ends(reentrant: bool) -> None:
    def around(block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=reentrant, preserve_rng_state=False)

    ends = []
    for model in (Stack(around, Dropping), fxfuse.optimize(Stack(around, Dropping))):
        for _ in range(2):
            torch.manual_seed(7)
            model(data()).sum().backward()
        ends.append(torch.get_rng_state())
    assert torch.equal(*ends)


@BOTH
def test_under_autocast(reentrant: bool) -> None:
    def around(block: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return checkpoint(block, x, use_reentrant=reentrant)

    def plain(block: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return block(x)

    model, wanted = fxfuse.optimize(Stack(around)), step(fxfuse.optimize(Stack(plain)))
    for _ in range(2):
        got = step(model)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert left_out(model)


def test_two_backwards_over_one_graph() -> None:
    model = fxfuse.optimize(Stack(lambda block, x: checkpoint(block, x, use_reentrant=False)))
    loss = model(data()).pow(2).mean()
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    agree([p.grad for p in model.parameters()], [2 * g for g in first])


def test_without_early_stop() -> None:
    def around(block: nn.Module, x: Tensor) -> Tensor:
        with set_checkpoint_early_stop(False):
            return checkpoint(block, x, use_reentrant=False)

    assert left_out(compared(around))


# --- when it is ----------------------------------------------------------------------------------------------


def squared(block: nn.Module) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        y = block(x)
        return y * y

    return run


@BOTH
def test_code_behind_the_block_reads_the_true_output(reentrant: bool) -> None:
    model = compared(lambda block, x: checkpoint(squared(block), x, use_reentrant=reentrant))
    assert not left_out(model)


@BOTH
def test_two_blocks_in_one_checkpoint_are_computed_up_to_the_last(reentrant: bool) -> None:
    def twice(block: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: block(block(x))

    compared(lambda block, x: checkpoint(twice(block), x, use_reentrant=reentrant))


@BOTH
def test_a_result_left_on_the_module_is_the_true_one(reentrant: bool) -> None:
    model = compared(lambda block, x: checkpoint(block, x, use_reentrant=reentrant), Remembering)
    assert not left_out(model)
    assert all(torch.isfinite(block.last).all() for block in model.blocks)


@BOTH
def test_hooks_see_the_true_output(reentrant: bool) -> None:
    model = fxfuse.optimize(Stack(lambda block, x: checkpoint(block, x, use_reentrant=reentrant)))
    seen: list[Tensor] = []
    model.blocks[1].register_forward_hook(lambda module, args, out: seen.append(out.detach().clone()))
    for _ in range(2):
        step(model)
    assert len(seen) == (4 if reentrant else 2)  # without reentry, the recomputation stops before a hook could run
    assert all(torch.equal(out, seen[0]) for out in seen)
    assert "2 Block blocks" in left_out(model)[0]


@BOTH
def test_buffers_change_as_in_eager(reentrant: bool) -> None:
    def around(block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=reentrant)

    wanted, model = Stack(around, Counting), fxfuse.optimize(Stack(around, Counting))
    for each in (wanted, model):
        for _ in range(2):
            step(each)
    for a, b in zip(model.blocks, wanted.blocks, strict=True):
        torch.testing.assert_close(a.seen, b.seen)


def test_a_checkpoint_within_a_checkpoint() -> None:
    def inner(block: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: checkpoint(block, x, use_reentrant=False).sin()

    compared(lambda block, x: checkpoint(inner(block), x, use_reentrant=False))


def test_selective_checkpointing_sees_every_operation() -> None:
    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        saved = op == torch.ops.aten.mm.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    def around(block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(
            block, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
        )

    assert not left_out(compared(around))


def test_a_step_after_one_that_failed_in_its_recomputation() -> None:
    fails = [False]

    def sometimes(block: nn.Module) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            if fails[0] and torch._C._current_graph_task_id() != -1:
                raise KeyError("planted")
            return block(x)

        return run

    def around(block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(sometimes(block), x, use_reentrant=False)

    model, wanted = compared(around), step(Stack(around))
    fails[0] = True
    with pytest.raises(KeyError, match="planted"):
        step(model)
    fails[0] = False
    agree(step(model), wanted)


def test_planted_a_proof_that_is_always_given_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "result_is_unread", lambda frame: torch._C._current_graph_task_id() != -1)
    model = fxfuse.optimize(Stack(lambda block, x: checkpoint(squared(block), x, use_reentrant=False)))
    assert not all(torch.isfinite(g).all() for g in step(model))


def test_what_counts_as_returning_a_result() -> None:
    found: list[bool] = []

    def look(*args: Any, **kwargs: Any) -> None:
        frame = sys._getframe(1)
        found.append(returns_what_it_calls(frame.f_code, frame.f_lasti))

    def returns(*args: Any, **kwargs: Any) -> Any:
        if args:
            return look(*args, **kwargs)
        return look()

    def keeps() -> Any:
        result = look()
        return result

    def guards() -> Any:
        with torch.no_grad():
            return look()

    def wraps() -> Any:
        return (look(),)

    for function in (returns, keeps, guards, wraps):
        function()
    returns(1, a=2)
    assert found == [True, False, False, False, True]
