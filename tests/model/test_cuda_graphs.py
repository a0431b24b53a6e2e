"""Blocks that are recorded and replayed give the same bits as blocks that are launched kernel by kernel.

There is no GPU here. The recorder is an imagined one that does the worst a CUDA graph may do to memory (tests/imagined_capture.py).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.cuda_graphs import recorder
from fxfuse.cuda_graphs.checkpoints import Waiting
from fxfuse.cuda_graphs.pool import Pool
from fxfuse.cuda_graphs.recording import Recording
from tests import recorded_steps as scripts
from tests.imagined_capture import imagined
from tests.recorded_steps import DEPTH, WIDTH, Run, Script, Stack, batch, results, told

# What the report must say of the calls that were not replayed; of the other scripts, all calls are replayed.
SAID = {
    scripts.lengths: "recordings for 4 sizes",
    scripts.two_forwards: "still in use",
    scripts.kept_outputs: "still in use",
    scripts.last_output: "still in use",
    scripts.kept_graphs: "",
    scripts.abandoned_forwards: "still in use",
    scripts.moved_weights: "did not lie where",
    scripts.gradient_of_the_input: "still in use",
    scripts.skipped_blocks: "did not lie where",
    scripts.checkpointed: "recorded",
    scripts.checkpointed_with_reentry: "use_reentrant=False",
    scripts.checkpointed_twice: "still in use",
}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    """Not after each test: all tests but those with ``own_graphs`` run the same ones."""


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[Pool, list[recorder.Tally]]]:
    tallies: list[recorder.Tally] = []

    def tally(graph: str) -> recorder.Tally:
        tallies.append(Tally(graph))
        return tallies[-1]

    Tally = recorder.Tally
    with pytest.MonkeyPatch.context() as patch, imagined(patch) as pool:
        patch.setattr(recorder, "Tally", tally)
        torch.compiler.reset()
        yield pool, tallies
        torch.compiler.reset()


@pytest.fixture
def pool(shared: tuple[Pool, list[recorder.Tally]]) -> Pool:
    """The pool, with nothing counted yet."""
    pool, tallies = shared
    pool.capture.busy = ""  # type: ignore[attr-defined]
    for tally in tallies:
        tally.recorded = tally.replayed = 0
        tally.plain.clear()
    return pool


@pytest.fixture
def own_graphs() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def fresh(change: Callable[[nn.Module], object] = lambda model: None, cuda_graphs: bool | str = True) -> Run:
    torch.manual_seed(0)
    model = Stack()
    change(model)
    fxfuse.optimize(model, cuda_graphs=cuda_graphs, validate="off")
    return Run(model, lambda model, index, rows: model(batch(index, rows)))


def same(pool: Pool, script: Script, **changes: Any) -> nn.Module:
    """The model after a script, which gave the same bits when nothing was replayed."""
    pool.capture.busy = "this is how it runs without"  # type: ignore[attr-defined]
    plain, recorded = fresh(**changes), fresh(**changes)
    wanted = results(script, plain)
    pool.capture.busy = ""  # type: ignore[attr-defined]
    for note in (t for module in plain.model.modules() for record in fxfuse.reporting.records.attached(module) for t in record.reads):
        note.plain.clear()
    for ours, theirs in zip(results(script, recorded), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    return recorded.model


@pytest.mark.parametrize("script", [*scripts.ON_ANY_MODEL, *scripts.ON_STACKS], ids=lambda script: script.__name__)
def test_the_same_bits(pool: Pool, script: Script) -> None:
    said = told(same(pool, script))
    assert SAID.get(script, "CUDA graphs") in said
    if script not in SAID:
        assert "because" not in said


def test_outputs_that_are_kept_are_copied_when_that_has_been_seen(pool: Pool) -> None:
    """One forward is launched: in it the last block's output is seen to be in use. Nothing is recorded again."""
    said = told(same(pool, scripts.last_output))
    assert f"{2 * DEPTH} recorded, {DEPTH * (8 + 7)} replays; 1 calls ran kernel by kernel" in said


def test_what_is_recorded_when(pool: Pool) -> None:
    """Forwards are recorded in the second step, backwards in the third; all are replayed from then on."""
    assert told(same(pool, scripts.steps)) == f"CUDA graphs of Block: {2 * DEPTH} recorded, {DEPTH * (5 + 4)} replays"


def test_a_further_size_is_recorded_where_memory_is_free(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool.capture, "free", 0)
    said = told(same(pool, scripts.lengths))
    assert "might not fit" in said
    assert f"{2 * DEPTH} recorded" in said


def test_a_frozen_bottom(pool: Pool) -> None:
    def freeze(model: nn.Module) -> None:
        model.first.requires_grad_(False)
        for name, parameter in model.body.named_parameters():
            parameter.requires_grad_(not name.startswith("blocks.0.") and "norm" in name)

    same(pool, scripts.steps, change=freeze)


def test_recordings_go_with_the_model_and_with_restore(pool: Pool) -> None:
    model = same(pool, scripts.steps)
    del model
    gc.collect()
    pool.forget_unheld()
    assert not pool._owners
    model = same(pool, scripts.steps)
    assert pool._owners
    fxfuse.restore(model)
    pool.forget_unheld()
    assert not pool._owners


FAULTS = [
    (Pool, "in_the_way", None, scripts.kept_outputs),
    (Recording, "fits", True, scripts.moved_weights),
    (Waiting, "find", None, scripts.checkpointed),
]


@pytest.mark.parametrize(("owner", "name", "answer", "script"), FAULTS)
def test_a_fault_is_seen(pool: Pool, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, answer: Any, script: Script) -> None:
    monkeypatch.setattr(owner, name, lambda *_: answer)
    with pytest.raises(AssertionError):
        same(pool, script)


def test_gradients_that_lie_in_a_recording_would_be_seen(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Recording.__init__
    monkeypatch.setattr(Recording, "__init__", lambda self, *args, **options: original(self, *args, **{**options, "fresh": ()}))
    run = fresh()
    results(scripts.accumulated, run)
    assert "still in use" in told(run.model)


def test_inside_a_recording_of_somebody_else_nothing_is_replayed(pool: Pool) -> None:
    run = fresh()
    pool.capture.busy = "a CUDA graph around it was being recorded"  # type: ignore[attr-defined]
    results(scripts.steps, run)
    assert "a CUDA graph around it" in told(run.model)


def test_what_draws_random_numbers_is_not_recorded(pool: Pool, own_graphs: None) -> None:
    def drop(model: nn.Module) -> None:
        for block in model.body.blocks:
            block.down = nn.Sequential(block.down, nn.Dropout(0.1))

    run = fresh(change=drop)
    results(scripts.steps, run)
    assert "draws random numbers" in told(run.model)
    assert " 0 recorded" in told(run.model)


def test_a_recording_that_fails_is_not_tried_again(pool: Pool, own_graphs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def fails(self: Any, run: Any, inputs: list) -> Any:
        tried.append(run)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(type(pool.capture), "__call__", fails)
    assert "recording failed: operation not permitted when stream is capturing" in told(same(pool, scripts.steps))
    assert len(tried) == 1


TIMED = [(0.0, "recorded"), (9.0, "the host is not what a step waits for"), (None, " 0 recorded")]


@pytest.mark.parametrize(("seconds", "said"), TIMED)
def test_auto_records_what_waits_for_the_host(pool: Pool, own_graphs: None, seconds: float | None, said: str) -> None:
    pool.capture.device_seconds = seconds  # type: ignore[attr-defined]
    run = fresh(cuda_graphs="auto")
    results(scripts.steps, run)
    assert said in told(run.model)
    assert (" 0 recorded" in told(run.model)) == (seconds != 0)


@pytest.mark.parametrize("options", [dict(memory="1GiB"), dict(remainder="inductor"), dict(cuda_graphs="yes")])
def test_what_does_not_go_together_is_said(options: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match="cuda_graphs"):
        fxfuse.optimize(nn.Linear(WIDTH, WIDTH), **{"cuda_graphs": True, **options})
