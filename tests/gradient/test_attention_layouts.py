"""Which way a layout takes from step to step: over chunks first, by FlexAttention once it was compiled beside and was faster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fxfuse import earlier_runs
from fxfuse.attention import beside, blocks, choice, execution, flex, fuse, hiding, layouts
from fxfuse.attention.beside import Beside
from fxfuse.attention.choice import Choice
from fxfuse.attention.flex import BACKWARD, FORWARD, Form, Request
from fxfuse.attention.ways import CHUNKS, FLEX, forms
from tests.gradient.test_attention import capped, causal, operands, results
from tests.gradient.test_flex_attention import by_flex, compiled, text_of, weights

__all__ = ["by_flex"]  # a fixture


class Process:
    """In place of the one that compiles: done when it is said to be."""

    started: list[Process] = []
    finished = False
    said: Callable[[Request], str] = staticmethod(lambda asked: "")

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = list(requests)
        Process.started.append(self)

    def done(self) -> bool:
        return Process.finished

    def problems(self) -> list[str]:
        return [Process.said(asked) for asked in self.requests]


@pytest.fixture(autouse=True)
def beside_it(monkeypatch: pytest.MonkeyPatch, by_flex: list[str]) -> None:
    """Nothing told, nothing known, no GPU needed; FlexAttention is faster forward."""
    known: dict[tuple, Any] = {}
    monkeypatch.setenv("FXFUSE_ATTENTION", "")
    monkeypatch.setattr(layouts, "Beside", Process)
    monkeypatch.setattr(layouts, "COST", 0.0)
    monkeypatch.setattr(beside, "has_room", lambda device: True)
    monkeypatch.setattr(choice, "measured", lambda requests: Choice({FORWARD: FLEX, BACKWARD: CHUNKS}, "faster"))
    monkeypatch.setattr(layouts.Layout, "asked", lambda self: (self.text, str(self.forms)))
    monkeypatch.setattr(earlier_runs, "remember", lambda kind, answer, *asked: known.update({asked: answer}))
    monkeypatch.setattr(Process, "started", [])
    monkeypatch.setattr(Process, "finished", False)


class Steps:
    """Training steps with one attention, each right; the directions in which FlexAttention ran in each."""

    def __init__(self, ran: list[str]) -> None:
        self.function, self.ran = compiled(capped), ran

    def __call__(self, length: int = 70, mask: Tensor | None = None) -> list[str]:
        before = len(self.ran)
        inputs = [t.detach()[:, :, :length].requires_grad_() for t in operands(torch.float32)]
        mask = causal()[..., :length, :length] if mask is None else mask
        for a, b in zip(results(self.function, inputs, mask), results(capped, inputs, mask), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
        layouts.after_step()
        return self.ran[before:]


def test_it_is_compiled_beside_and_taken_behind_a_step(by_flex: list[str]) -> None:
    step = Steps(by_flex)
    assert step() == step() == []
    assert len(Process.started) == 1
    assert {asked.direction for asked in Process.started[0].requests} == {FORWARD, BACKWARD}
    assert step() == []
    Process.finished = True
    assert step() == []  # behind this one it is taken up
    assert step() == step() == [FORWARD]
    assert len(Process.started) == 1


def test_never_between_a_forward_and_its_backward(by_flex: list[str]) -> None:
    step = Steps(by_flex)
    step(), step()
    Process.finished = True
    inputs, mask = operands(torch.float32), causal()
    inputs[0].register_hook(lambda gradient: layouts.after_step())  # an optimizer that steps in the middle of a backward
    results(step.function, inputs, mask)
    assert all(layout.choice is None for layout in layouts._layouts.values())
    layouts.after_step()
    assert all(layout.choice is not None for layout in layouts._layouts.values())


def test_what_saves_less_than_it_costs_is_not_tried(by_flex: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "COST", 1.0)
    step = Steps(by_flex)
    assert [step() for _ in range(4)] == [[]] * 4
    assert not Process.started


def test_what_is_told_and_means_nothing_is_said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXFUSE_ATTENTION", "quick")
    assert choice.told() == choice.told() == ""
    assert [record.message for record in caplog.records if "FXFUSE_ATTENTION=quick" in record.message] != []


def test_a_length_that_does_not_come_again_is_not_tried(by_flex: list[str]) -> None:
    step = Steps(by_flex)
    for length in (32, 40, 48, 56):
        step(length)
    assert not Process.started


def test_kernels_that_do_not_compile_leave_the_chunks(by_flex: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Process, "said", staticmethod(lambda asked: "InductorError: no"))
    monkeypatch.setattr(Process, "finished", True)
    step = Steps(by_flex)
    assert [step() for _ in range(6)] == [[]] * 6
    assert len(Process.started) == 1
    (layout,) = layouts._layouts.values()
    assert layout.choice is not None
    assert "InductorError" in layout.choice.words


def test_a_mask_of_another_kind_is_compiled_beside_too(by_flex: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel for blocks that follow each other does not do for blocks that do not."""
    monkeypatch.setattr(Process, "finished", True)
    monkeypatch.setattr("fxfuse.attention.blocks.SIZE", 8)
    step, window = Steps(by_flex), causal(window=20)[..., :64, :64]
    step(64), step(64), step(64)
    assert step(64) == [FORWARD]
    assert step(64, window) == step(64, window) == []
    assert step(64, window) == [FORWARD]
    assert len(Process.started) == 2


def test_an_answer_from_disk_is_taken_at_once(by_flex: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    begin = layouts._begin

    def recalled(layout: layouts.Layout) -> None:
        layout.device = torch.device("cuda")
        begin(layout)

    monkeypatch.setattr(layouts, "_begin", recalled)
    folder = layouts._kernels_on_disk()
    monkeypatch.setattr(earlier_runs, "recall", lambda *_: [FLEX, CHUNKS, "faster", folder])
    assert Steps(by_flex)() == [FORWARD]
    layouts._layouts.clear()
    monkeypatch.setattr(earlier_runs, "recall", lambda *_: [FLEX, CHUNKS, "faster", ["elsewhere", 1]])  # its kernels are gone
    assert Steps(by_flex)() == []


def test_a_backward_over_chunks_waits_for_no_mask_of_its_own(by_flex: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    read, read_blocks = hiding._read, blocks._blocks_of
    monkeypatch.setattr(hiding, "_read", lambda *a: reads.append("chunks") or read(*a))
    monkeypatch.setattr(blocks, "_blocks_of", lambda *a: reads.append("blocks") or read_blocks(*a))
    monkeypatch.setattr(execution, "queries_in_chunk", lambda row_bytes: 32)
    monkeypatch.setattr(Process, "finished", True)
    step = Steps(by_flex)
    step(), step(), step()
    reads.clear()
    out = step.function(*operands(torch.float32), causal())
    forward = list(reads)
    assert {"blocks", "chunks"} <= set(forward)
    out.sum().backward()
    assert reads == forward


def test_the_report_says_what_was_chosen(by_flex: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    sites: list[Any] = []
    tell = fuse.tell
    monkeypatch.setattr(fuse, "tell", lambda text, site: sites.append(site) or tell(text, site))
    monkeypatch.setattr(Process, "finished", True)
    step = Steps(by_flex)
    step(), step(), step()
    assert [(s.implementation, s.reason) for s in sites] == [("FlexAttention forward, chunks of queries", "faster")]


def test_the_process_compiles_and_says_what_it_could_not() -> None:
    text, scores = text_of(weights)
    q, k, v = (torch.randn(1, 64, heads, 16).transpose(1, 2) for heads in (4, 2, 2))
    mask = torch.zeros(1, 1, 64, 64)
    whole, read = flex.expanded(mask, q, k), blocks.blocks_of(mask, None)
    asked = flex.request(FORWARD, text, scores, forms(FORWARD, (q, k, v)), read, Form.of(whole))
    process = Beside([asked, Request(FORWARD, "no program", scores, asked.forms, 3, asked.rest, asked.places, True)])
    process.process.wait(timeout=120)
    fine, problem = process.problems()
    assert fine == ""
    assert "program" in problem.lower()
