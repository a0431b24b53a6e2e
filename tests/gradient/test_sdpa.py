"""SDPA by another library: what runs, when it changes, and that it computes the same. The library is played by arithmetic on a CPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfuse
from fxfuse import earlier_runs
from fxfuse.attention import beside
from fxfuse.attention.flex import BACKWARD, FORWARD, Form
from fxfuse.backend import Backend
from fxfuse.sdpa import layouts, library, sites, trial
from fxfuse.sdpa.families import FAMILIES, arguments, is_plain
from fxfuse.sdpa.library import Problem
from fxfuse.sdpa.trial import Choice
from tests.model.builders import llama

CPU = FAMILIES[-1]
BOTH = frozenset({FORWARD, BACKWARD})


def weights_and_sums(query: Tensor, key: Tensor, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(2, 3)
    scores = scores * (query.shape[3] ** -0.5 if scale is None else scale)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[2:], dtype=torch.bool).triu(1), float("-inf"))
    return scores.softmax(-1), scores.logsumexp(-1)


class Upright:
    """torch's kernels with the sums as cuDNN has them, [b, h, q, 1]."""

    rest = staticmethod(CPU.rest)

    @staticmethod
    def forward(*call: Any) -> tuple[Tensor, Tensor, tuple]:
        out, sums, rest = CPU.forward(*call)
        return out, sums.unsqueeze(-1), rest

    @staticmethod
    def backward(arriving: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, *rest: Any) -> Any:
        return CPU.backward(arriving, query, key, value, out, sums.squeeze(-1), *rest)


class Played:
    """flash-attn-4's two functions, in arithmetic; ``ran`` says which were called."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def _flash_attn_fwd(self, query: Tensor, key: Tensor, value: Tensor, softmax_scale: float | None, causal: bool, return_lse: bool,
                        out: Tensor) -> tuple:  # fmt: skip
        assert return_lse
        self.ran.append(FORWARD)
        query, key, value = (t.transpose(1, 2).float() for t in (query, key, value))
        weights, sums = weights_and_sums(query, key, causal, softmax_scale)
        out.copy_((weights @ value.repeat_interleave(query.shape[1] // key.shape[1], 1)).transpose(1, 2))
        return out, sums, None, None, None

    def _flash_attn_bwd(self, query: Tensor, key: Tensor, value: Tensor, out: Tensor, arriving: Tensor, sums: Tensor,
                        softmax_scale: float | None, causal: bool, dq: Tensor, dk: Tensor, dv: Tensor) -> None:  # fmt: skip
        self.ran.append(BACKWARD)
        assert sums.shape == (query.shape[0], query.shape[2], query.shape[1])
        leaves = [t.transpose(1, 2).float().detach().requires_grad_() for t in (query, key, value)]
        with torch.enable_grad():
            weights, own = weights_and_sums(*leaves[:2], causal, softmax_scale)
            assert torch.allclose(own, sums, rtol=0, atol=2e-4)  # (torch approximates the exponential on CPUs)
            again = weights @ leaves[2].repeat_interleave(query.shape[2] // key.shape[2], 1)
            found = torch.autograd.grad(again, leaves, arriving.transpose(1, 2).float())
        for place, gradient in zip((dq, dk, dv), found, strict=True):
            place.copy_(gradient.transpose(1, 2))


class Process:
    """In place of the one that compiles: done when it is said to be."""

    started: list[list[Problem]] = []
    finished = True
    said = ""

    def __init__(self, requests: Sequence[Problem], compile: Any) -> None:
        assert compile is library.compiled
        self.requests = list(requests)
        Process.started.append(self.requests)

    def done(self) -> bool:
        return Process.finished

    def problems(self) -> list[str]:
        return [Process.said] * len(self.requests)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    """The library is installed, fits every problem, is imported at once, worth a trial and faster in both directions."""
    module, known, imported = Played(), {}, []
    monkeypatch.setenv("FXFUSE_SDPA", "")
    monkeypatch.setattr(library, "installed", lambda: "4")
    monkeypatch.setattr(library, "why_not", lambda problem: "")
    monkeypatch.setattr(library, "load", lambda: imported.append(1) or module)
    monkeypatch.setattr(library, "is_loaded", lambda: bool(imported))
    monkeypatch.setattr(beside, "has_room", lambda device: True)
    monkeypatch.setattr(layouts, "Beside", Process)
    monkeypatch.setattr(layouts, "COST", 0.0)
    monkeypatch.setattr(layouts, "_now", layouts._Now())
    monkeypatch.setattr(layouts, "_layouts", {})
    monkeypatch.setattr(layouts, "_shared", {})
    monkeypatch.setattr(layouts.Layout, "asked", lambda self: (str(self.problem),))
    monkeypatch.setattr(sites, "DTYPES", (torch.float32, torch.bfloat16))
    monkeypatch.setattr(trial, "measured", lambda problem, torchs: Choice(BOTH, "faster"))
    monkeypatch.setattr(trial, "worst_ratio", lambda problem, torchs: 1.0)
    monkeypatch.setitem(trial.LIMITS, torch.float32, 2.0)
    monkeypatch.setattr(earlier_runs, "remember", lambda kind, answer, *asked: known.update({(kind, *asked): answer}))
    monkeypatch.setattr(earlier_runs, "recall", lambda kind, *asked: known.get((kind, *asked)))
    monkeypatch.setattr(Process, "started", [])
    monkeypatch.setattr(Process, "finished", True)
    monkeypatch.setattr(Process, "said", "")
    torch.use_deterministic_algorithms(False)  # (the fixture of all tests turns it on, and back)
    torch._dynamo.reset()
    return module


def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool = True, **named: Any) -> Tensor:
    return F.scaled_dot_product_attention(query * 1.0, key * 1.0, value * 1.0, is_causal=causal, **named)


def operands(length: int = 24, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(2, length, 4, 8, generator=generator).to(dtype).transpose(1, 2).requires_grad_() for _ in range(3)]


def results(function: Any, inputs: Sequence[Tensor], **named: Any) -> list[Tensor]:
    out = function(*inputs, **named)
    arriving = torch.randn(out.transpose(1, 2).shape, generator=torch.Generator().manual_seed(3)).to(out.dtype).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, inputs, arriving)]


class Steps:
    """Training steps with one attention, each right; the directions in which the library ran in each."""

    def __init__(self, module: Played) -> None:
        self.module = module
        self.function = torch.compile(attend, backend=Backend(strict=True), fullgraph=True, dynamic=True)

    def __call__(self, length: int = 24, **named: Any) -> list[str]:
        before = len(self.module.ran)
        for a, b in zip(results(self.function, operands(length), **named), results(attend, operands(length), **named), strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()
            assert a.stride() == b.stride()
        ran = self.module.ran[before:]
        layouts.after_step()
        return ran

    def until_imported(self) -> None:
        if layouts._now.importing is not None:
            layouts._now.importing.join()


def test_compiled_beside_imported_and_then_taken(played: Played) -> None:
    step = Steps(played)
    assert step() == []  # behind it a process compiles
    assert len(Process.started) == 1
    assert step() == []  # behind it that is taken up
    assert step() == []  # behind it the library is imported
    step.until_imported()
    assert step() == []  # behind it both are timed
    assert step() == [FORWARD, BACKWARD]
    assert len(Process.started) == 1


def test_a_later_process_only_imports(played: Played) -> None:
    step = Steps(played)
    for _ in range(4):
        step()
        step.until_imported()
    assert step() == [FORWARD, BACKWARD]
    layouts._layouts.clear()
    layouts._shared.clear()
    assert [step(), step(), step()] == [[], [FORWARD, BACKWARD], [FORWARD, BACKWARD]]
    assert len(Process.started) == 1


def test_what_an_earlier_process_found_is_judged_once_more(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Steps(played)
    for _ in range(4):
        step()
        step.until_imported()
    layouts._layouts.clear()
    layouts._shared.clear()
    monkeypatch.setattr(trial, "worst_ratio", lambda problem, torchs: 9.0)
    assert [step(), step(), step()] == [[], [], []]
    assert "9.0 times" in next(iter(layouts._shared.values())).choice.words  # type: ignore[union-attr]


def test_what_was_slower_is_remembered_and_asked_no_more(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "measured", lambda problem, torchs: Choice(frozenset(), "slower"))
    monkeypatch.setenv("FXFUSE_SDPA", "measure")
    step = Steps(played)
    assert [step(), step(), step()] == [[], [], []]
    monkeypatch.setenv("FXFUSE_SDPA", "")
    layouts._layouts.clear()
    layouts._shared.clear()
    monkeypatch.setattr(trial, "measured", lambda problem, torchs: pytest.fail("timed again"))
    assert [step(), step(), step()] == [[], [], []]
    assert Process.started == []


def test_one_direction_alone(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXFUSE_SDPA", "measure")
    for direction in (FORWARD, BACKWARD):
        layouts._layouts.clear()
        layouts._shared.clear()
        monkeypatch.setattr(trial, "measured", lambda problem, torchs, way=direction: Choice(frozenset({way}), "faster"))
        step = Steps(played)
        step(), step()
        assert step() == [direction]


def test_torchs_kernels_where_they_are_asked_for(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXFUSE_SDPA", "torch")
    step = Steps(played)
    assert [step() for _ in range(4)] == [[]] * 4


def test_deterministic_algorithms_are_torchs(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXFUSE_SDPA", "measure")
    step = Steps(played)
    step(), step()
    assert step() == [FORWARD, BACKWARD]
    torch.use_deterministic_algorithms(True)
    assert step() == []
    torch.use_deterministic_algorithms(False)
    assert step() == [FORWARD, BACKWARD]


def test_lengths_of_one_size_share_an_answer(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXFUSE_SDPA", "measure")
    step = Steps(played)
    step(24), step(24)
    assert step(30) == [FORWARD, BACKWARD]
    assert step(50) == []


@pytest.mark.parametrize("problem", ["OutOfMemoryError: none left", "ImportError: no such symbol"])
def test_a_library_that_fails_is_left(played: Played, monkeypatch: pytest.MonkeyPatch, problem: str) -> None:
    monkeypatch.setattr(Process, "said", problem)
    step = Steps(played)
    assert [step() for _ in range(4)] == [[]] * 4
    assert problem in next(iter(layouts._shared.values())).choice.words  # type: ignore[union-attr]


def test_an_import_that_fails_is_told_and_left(played: Played, monkeypatch: pytest.MonkeyPatch,
                                               caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    def load() -> Any:
        raise RuntimeError("built for another CUDA")

    monkeypatch.setattr(library, "load", load)
    step = Steps(played)
    for _ in range(4):
        assert step() == []
        step.until_imported()
    assert "built for another CUDA" in caplog.text
    assert next(iter(layouts._shared.values())).taken == frozenset()


def test_a_plan_without_room_puts_the_trial_off(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXFUSE_SDPA", "measure")
    monkeypatch.setattr(layouts.room, "is_there", lambda needed, device: False)
    step = Steps(played)
    assert [step() for _ in range(3)] == [[]] * 3
    monkeypatch.setattr(layouts.room, "is_there", lambda needed, device: True)
    step()
    assert step() == [FORWARD, BACKWARD]


def test_never_between_a_forward_and_its_backward(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXFUSE_SDPA", "measure")
    step = Steps(played)
    step()
    inputs = operands()
    inputs[0].register_hook(lambda gradient: layouts.after_step())  # an optimizer that steps in the middle of a backward
    results(step.function, inputs)
    assert played.ran == []
    assert step() == []


@pytest.mark.parametrize("named", [{"dropout_p": 0.25}, {"attn_mask": torch.zeros(24, 24), "causal": False}], ids=str)
def test_what_only_torchs_kernels_have_stays(played: Played, named: dict[str, Any]) -> None:
    graph = torch.fx.Graph()
    query = graph.placeholder("query")
    node = graph.call_function(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default, (query, query, query),
                               {key: value for key, value in named.items() if key != "causal"})  # fmt: skip
    assert not is_plain(node)
    assert is_plain(graph.call_function(node.target, (query, query, query)))
    assert not is_plain(graph.call_function(node.target, (query, query, query), {"scale": query}))  # known when it runs
    assert arguments(node)["is_causal"] is False


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("torchs", [CPU, Upright], ids=["flat", "upright"])
def test_either_backward_follows_either_forward(played: Played, causal: bool, scale: float | None, torchs: Any,
                                                monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.undo()
    monkeypatch.setattr(library, "load", lambda: played)
    problem = Problem(tuple(Form.of(t) for t in operands(40, torch.bfloat16)), causal, scale)  # type: ignore[arg-type]
    assert trial.worst_ratio(problem, torchs) < 1.5


@pytest.mark.parametrize("fault", ["scale", "causal", "sums", "gradient"])
def test_a_faulty_library_is_not_taken(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Faulty(Played):
        def _flash_attn_fwd(self, *tensors: Tensor, **named: Any) -> tuple:
            wrong = {"scale": {"softmax_scale": 0.5}, "causal": {"causal": False}}.get(fault, {})
            out, sums, *rest = super()._flash_attn_fwd(*tensors, **(named | wrong))
            return out, sums * 1.01 if fault == "sums" else sums, *rest

        def _flash_attn_bwd(self, *tensors: Tensor, **named: Any) -> None:
            super()._flash_attn_bwd(*tensors[:5], weights_and_sums(
                *(t.transpose(1, 2).float() for t in tensors[:2]), named["causal"], named["softmax_scale"])[1], **named)  # fmt: skip
            if fault == "gradient":
                named["dk"].mul_(1.02)

    monkeypatch.setattr(library, "load", Faulty)
    problem = Problem(tuple(Form.of(t) for t in operands(40, torch.bfloat16)), True, None)  # type: ignore[arg-type]
    assert trial.worst_ratio(problem, CPU) > 2.0


def test_a_trial_draws_none_of_the_callers_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load", Played)
    monkeypatch.setattr(trial, "milliseconds", lambda run: (run(), 1.0)[1])
    problem = Problem(tuple(Form.of(t) for t in operands(16, torch.bfloat16)), True, None)  # type: ignore[arg-type]
    before = torch.get_rng_state()
    trial.measured(problem, CPU)
    trial.judged(problem, CPU, BOTH, "")
    assert torch.equal(torch.get_rng_state(), before)


def test_faster_by_little_is_not_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load", Played)
    problem = Problem(tuple(Form.of(t) for t in operands(16, torch.bfloat16)), True, None)  # type: ignore[arg-type]
    order = iter([1.0, 0.98, 2.0, 1.5])
    monkeypatch.setattr(trial, "milliseconds", lambda run: (run(), next(order))[1])
    found = trial.measured(problem, CPU)
    assert found.taken == {BACKWARD}
    assert found.words == "forward torch 1.00 ms, flash-attn-4 0.98 ms; backward torch 2.00 ms, flash-attn-4 1.50 ms"


def test_a_models_steps_are_the_same(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXFUSE_SDPA", "measure")
    wanted, model = llama(2), llama(2)
    fxfuse.optimize(model, strict=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(1, 96, (2, 32), generator=torch.Generator().manual_seed(4))

    def gradients(module: nn.Module) -> list[Tensor]:
        module.zero_grad()
        module(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return [p.grad.clone() for p in module.parameters() if p.grad is not None]

    for _ in range(3):
        for a, b in zip(gradients(model), gradients(wanted), strict=True):
            assert (a - b).norm() <= 2e-5 * b.norm()
        torch.optim.SGD(model.parameters(), lr=0.0).step()
    assert played.ran.count(BACKWARD) == 2  # two layers, in the third step
    assert played.ran.count(FORWARD) == 4  # and in the checkpoints' replay
    assert any("runs by flash-attn-4" in note for note in fxfuse.report(model).notes)
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    assert played.ran.count(FORWARD) == 6  # a reference runs as its policy


def on_hopper(heads: int = 8, length: int = 64, dtype: torch.dtype = torch.bfloat16, strides: tuple[int, ...] | None = None) -> Form:
    return Form((2, heads, length, 64), strides or (heads * length * 64, 64, heads * 64, 1), dtype, torch.device("cuda", 0))


@pytest.mark.parametrize(("forms", "causal", "why"), [
    ((on_hopper(), on_hopper(2), on_hopper(2)), True, ""),
    ((on_hopper(), on_hopper(length=96), on_hopper(length=96)), False, ""),
    ((on_hopper(), on_hopper(length=96), on_hopper(length=96)), True, "last key"),
    ((on_hopper(dtype=torch.float32),) * 3, True, "16 bits"),
    ((on_hopper(), on_hopper(dtype=torch.float16), on_hopper()), True, "16 bits"),
    ((on_hopper(length=0),) * 3, True, "not empty"),
    ((on_hopper(strides=(32768, 4096, 1, 64)), on_hopper(), on_hopper()), True, "contiguous"),
    ((on_hopper(8), on_hopper(3), on_hopper(3)), True, "evenly"),
])  # fmt: skip
def test_problems_that_it_has_kernels_for(forms: Any, causal: bool, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    found = library.why_not(Problem(forms, causal, None))
    assert why in found
    assert bool(why) == bool(found)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "capability" in library.why_not(Problem(forms, causal, None))


def test_importing_it_leaves_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []
    monkeypatch.setattr(library, "is_loaded", lambda: False)
    monkeypatch.setattr(library.importlib, "import_module", lambda name: seen.append(dict(os.environ)))
    monkeypatch.delenv(library.KEEPS, raising=False)
    monkeypatch.setenv(library.FOLDER, "/elsewhere")
    before = dict(os.environ)
    library.load()
    assert seen[0][library.KEEPS] == "1"
    assert seen[0][library.FOLDER] == "/elsewhere"  # who says otherwise is heard
    assert dict(os.environ) == before
