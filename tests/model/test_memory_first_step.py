"""The first step under a budget that the points which save least do not keep: who is told to do with less, when, and in whose names."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import pytest
import torch

import fxfuse
from fxfuse.capture import find_installation, governor
from fxfuse.capture.dispatcher import Dispatcher
from fxfuse.capture.governor import Governor
from fxfuse.memory.plan import Choice
from fxfuse.memory.planner import Problem
from fxfuse.memory.surveys import surveys_under
from fxfuse.reporting.records import attached
from tests.model.builders import VOCABULARY, llama

LAYERS = 3
saved = attrgetter("saved_bytes")


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, str]]:
    """Nothing fits, and nobody minds; the device counts as one whose allocator is known; the least is what saves least. What blocks are
    told is collected."""
    told: list[tuple[Any, str]] = []
    problem, follow = Governor.problem, Dispatcher.follow

    def as_on_a_gpu(self: Governor, *args: Any, **kwargs: Any) -> Problem:
        found = problem(self, *args, **kwargs)
        found.saved_only = False
        return found

    def noted(self: Dispatcher, plan: str) -> None:
        told.append((self.module, plan))
        follow(self, plan)

    monkeypatch.setattr(Governor, "problem", as_on_a_gpu)
    monkeypatch.setattr(Governor, "_limit", lambda self, readings: (1, 0))
    monkeypatch.setattr(governor, "choose_points", lambda problem, limit: [])
    monkeypatch.setattr(governor, "least_points", lambda problem: problem.start(lambda points: min(points, key=saved)))
    monkeypatch.setattr(Dispatcher, "follow", noted)
    return told


def test_blocks_to_come_follow_once_one_like_them_has_run(scarce: list[tuple[Any, str]]) -> None:
    """The embeddings are frozen: the first block's input needs no gradient, and its graph is that of the others all the same."""
    ids = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
    model, eager = llama(layers=LAYERS), llama(layers=LAYERS)
    for each in (model, eager):
        each.get_input_embeddings().requires_grad_(False)
    fxfuse.optimize(model, memory=1 << 20, remainder="eager", validate="off", strict=True)
    scarce.clear()  # that all are to save least
    known: list[int] = []
    blocks = list(model.model.layers)
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: known.append(len(scarce)))
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    assert known[:2] == [0, 0]
    assert known[2] == LAYERS
    first, second = (surveys_under(block)[0] for block in blocks[:2])
    assert first is second
    for _, plan in scarce[:LAYERS]:
        choice, survey = Choice.parse(plan), first
        assert choice.recompute
        assert set(choice.recompute) <= {node.name for node in survey.joint.graph.nodes}
    loss.backward()
    eager(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            assert (ours.grad - theirs.grad).norm() <= 1e-5 * theirs.grad.norm()
    assert find_installation(model).governor.plan is None


def test_where_there_is_hardly_room_the_first_blocks_run_in_tiles_and_use_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known of a block before it has run; the widest part of it does not exist as a whole even then, and what it saves
    leaves the device."""
    monkeypatch.setattr(Governor, "_is_scarce", lambda self, readings: True)
    ids = torch.randint(0, VOCABULARY, (2, 256), generator=torch.Generator().manual_seed(0))
    torch.use_deterministic_algorithms(False)
    model, eager = (llama(layers=LAYERS, intermediate_size=512) for _ in range(2))  # wider than what attention's backward needs
    fxfuse.optimize(model, memory=1 << 30, remainder="eager", validate="off", strict=True)
    for each in (model, eager):
        each(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    sources = [record.backward_source for record in attached(model.model.layers[0]) if record.kind == "block"]
    assert any("4 tiles of at most 128 rows" in source for source in sources)
    sent = [record.forward_source.count("fxfuse.offload") for record in attached(model.model.layers[1]) if record.kind == "block"]
    assert sent
    assert min(sent) >= 2  # the block's input and what attention gives
    for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_the_widest_part_of_a_block() -> None:
    from fxfuse.capture.device_memory import wide_bytes
    from tests.model.quantized_models import in_4bit

    model = in_4bit(torch.nn.Sequential(torch.nn.Linear(64, 192), torch.nn.Linear(192, 64)))
    assert wide_bytes(10, [model]) == 8 * 2 * 10 * 192
    assert wide_bytes(10, [torch.nn.LayerNorm(512)]) == 8 * 2 * 10
