"""A checkpointed model whose attention changes its way: between two steps only, and never what it computes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse.attention import execution, hiding
from fxfuse.attention.known_masks import forget_masks
from tests.gradient.test_attention_layouts import Process, beside_it
from tests.gradient.test_flex_attention import by_flex
from tests.model.builders import gemma2

__all__ = ["beside_it", "by_flex"]  # fixtures: FlexAttention's kernels stand in, and are faster forward


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(execution, "SCORES_BYTES", 1)
    monkeypatch.setattr(execution, "STEP", 8)
    monkeypatch.setattr(hiding, "STEP", 4)
    monkeypatch.setattr("fxfuse.attention.blocks.SIZE", 4)
    yield
    forget_masks()


PLAIN, PADDED, PACKED, OTHERWISE_PACKED = "plain", "padded", "packed", "otherwise packed"
LENGTH = 32


def inputs(kind: str, length: int = LENGTH) -> dict[str, Tensor]:
    ids = torch.randint(1, 96, (2, length), generator=torch.Generator().manual_seed(4))
    found = {"input_ids": ids, "labels": ids}
    if kind == PADDED:
        found["attention_mask"] = (torch.arange(length) < torch.tensor([[length], [length - 8]])).long()
    if kind in (PACKED, OTHERWISE_PACKED):
        first = 12 if kind == PACKED else 20
        found["position_ids"] = torch.cat([torch.arange(first), torch.arange(length - first)]).expand(2, -1)
    return found


def gradients(model: nn.Module, given: dict[str, Tensor]) -> list[Tensor]:
    """The loss and the gradients."""
    model.zero_grad()
    loss = model(**given, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def step(model: nn.Module, given: dict[str, Tensor]) -> list[Tensor]:
    """The same, and an optimizer's step that changes nothing."""
    found = gradients(model, given)
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    return found


def pair() -> tuple[nn.Module, nn.Module]:
    wanted, model = (gemma2(2, attn_implementation="eager") for _ in range(2))
    fxfuse.optimize(model, strict=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return wanted, model


def test_steps_before_and_behind_the_change_are_right(by_flex: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Process, "finished", True)
    wanted, model = pair()
    each = []
    for kind in (PLAIN, PLAIN, PLAIN, PLAIN, PADDED, PACKED, OTHERWISE_PACKED, PLAIN):
        before = len(by_flex)
        for a, b in zip(step(model, inputs(kind)), gradients(wanted, inputs(kind)), strict=True):
            assert (a - b).norm() <= 2e-5 * b.norm(), kind
        each.append(by_flex[before:])
    assert each[:3] == [[]] * 3
    # A layer with a window and one without, each in the forward and in the checkpoint's replay.
    assert each[3] == each[-1] == ["forward"] * 4
    assert all(len(ran) in (0, 2, 4) and set(ran) <= {"forward"} for ran in each)
    report = str(fxfuse.report(model))
    assert "FlexAttention forward" in report


def test_lengths_that_change_run_over_chunks(by_flex: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Process, "finished", True)
    wanted, model = pair()
    for length in (16, 20, 24, 28):
        for a, b in zip(step(model, inputs(PLAIN, length)), gradients(wanted, inputs(PLAIN, length)), strict=True):
            assert (a - b).norm() <= 2e-5 * b.norm()
    assert by_flex == []
    assert not Process.started
