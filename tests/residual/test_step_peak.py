"""The most that lives in a step of real tensors, by the allocator's own count, against what plans predict.

On a CPU fused ops run as many operations and attention has buffers of its own: what these allocate inside is left out of the count, and
of the prediction. What comes in is a leaf, as where adapters are trained under a checkpoint; what comes out is held, with its gradient.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from fxfuse import bufferize, lowering
from fxfuse.memory import points, surveys
from fxfuse.memory.plan import Choice, Held, peak_of
from fxfuse.memory.points import Survey
from fxfuse.memory.sizes import Sizes
from fxfuse.memory.surveys import surveys_under
from fxfuse.memory.tiles import live
from tests.model.builders import llama
from tests.residual.test_memory_points import under

LAYERS, LENGTH, WIDTH, HIDDEN = 4, 4096, 64, 224
UNIT = LENGTH * WIDTH * 2  # bytes of a tensor as wide as the model, in bfloat16
ANGLES = UNIT // 2  # as wide as one of four heads each
ONE_OP = "one fused op"


@pytest.fixture
def one_op_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused ops write in place as on a GPU; each says when it begins and ends."""
    make = bufferize.launcher

    @lru_cache
    def launcher(text: str, device: str) -> Callable[..., Any]:
        run = make(text, device)

        def launch(*args: Any, **kwargs: Any) -> Any:
            with record_function(ONE_OP):
                return run(*args, **kwargs)

        launch.__name__, launch.__qualname__, launch.__module__ = run.__name__, run.__qualname__, run.__module__
        return launch

    monkeypatch.setattr(bufferize, "launcher", launcher)
    monkeypatch.setattr(lowering, "REUSE_ON_CPU", True)
    for module in (points, live):
        monkeypatch.setattr(module, "scratch_bytes", lambda node, sizes: 0)


def planned(plans: Callable[[Survey], list[str]], *, trained: bool = False) -> tuple[nn.Module, list[str], list[Survey]]:
    """A model whose blocks follow plans, once the first step has compiled them. ``trained``: all weights, not the norms' alone."""
    surveys._surveys.clear()
    model = under(llama(LAYERS, hidden_size=WIDTH, intermediate_size=HIDDEN).bfloat16(), "keep")
    for parameter in model.parameters():
        parameter.requires_grad_(trained or parameter.dim() == 1)  # the norms' weights: next to no gradients
    blocks = list(model.model.layers)
    step(model)
    texts = plans(surveys_under(blocks[1])[0])
    for block, text in zip(blocks, texts, strict=True):
        block._compiled_call_impl.follow(text)
    step(model)
    return model, texts, [surveys_under(block)[0] for block in blocks]


def step(model: nn.Module) -> None:
    ids = torch.zeros(1, LENGTH, dtype=torch.long)
    model.zero_grad()
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state.backward(torch.ones(1, LENGTH, WIDTH, dtype=torch.bfloat16))


def most_allocated(model: nn.Module) -> int:
    """Bytes, beyond what was there, whenever no operation whose inside does not count is running."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step(model)
    events = found.profiler.kineto_results.events()
    inside = sorted((e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() == ONE_OP or "attention" in e.name())
    begins, ends = [begin for begin, _ in inside], [end for _, end in inside]
    level = most = 0
    for at, count in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        level += count
        last = bisect_right(begins, at) - 1
        if not any(ends[i] >= at for i in range(max(last - 2, 0), last + 1)):
            most = max(most, level)
    return most


def on_the_host(survey: Survey) -> list[str]:
    sizes = Sizes(survey.compiled_for)
    return [str(survey.offloaded(Choice(), sizes)[0])] * LAYERS


def mixed(survey: Survey) -> list[str]:
    """The first blocks keep least, the last most, in tiles."""
    sizes = Sizes(survey.compiled_for)
    least, most = (str(survey.offloaded(Choice(recompute=names), sizes)[0]) for names in (survey.chain[-1], ()))
    return [least] * (LAYERS // 2) + [f"{most};tiles:4"] * (LAYERS // 2)


def kept_last(survey: Survey) -> list[str]:
    """All blocks but the last send what they keep to the host, where that of the last but one waits while the last runs."""
    away = survey.offloaded(Choice(recompute=survey.chain[1]), Sizes(survey.compiled_for))[0]
    return [str(away)] * (LAYERS - 1) + ["keep"]


def largest_away(survey: Survey) -> list[str]:
    """The first blocks send their largest tensor to the host, the last keep all."""
    away = survey.offloaded(Choice(), Sizes(survey.compiled_for))[-1]
    return [str(away)] * (LAYERS - 1) + ["keep"]


SLOW = [pytest.param(plans, marks=pytest.mark.slow) for plans in (largest_away, on_the_host)]


@pytest.mark.parametrize("plans", [mixed, kept_last, *SLOW])
def test_a_step_holds_what_its_plan_says(plans: Callable[[Survey], list[str]], one_op_each: None) -> None:
    model, texts, found = planned(plans)
    torch.use_deterministic_algorithms(False)
    assert {"keep", *texts} <= found[0].block(Sizes(found[0].compiled_for)).compiled
    chosen = [survey.point(Choice.parse(text), Sizes(survey.compiled_for)) for survey, text in zip(found, texts, strict=True)]
    predicted = peak_of(chosen, [0] * LAYERS, held=Held(leaf=True, outputs=2 * UNIT)).total + ANGLES
    assert predicted > 20 * UNIT
    assert 0.97 * predicted < most_allocated(model) < 1.01 * predicted


def roomy(survey: Survey) -> list[str]:
    """The last blocks keep all cheap outputs too."""
    largest = survey.roomier(Sizes(survey.compiled_for))[-1]
    return ["keep"] * (LAYERS // 2) + [largest.text] * (LAYERS - LAYERS // 2)


def test_a_step_holds_the_cheap_outputs_that_its_plan_keeps(one_op_each: None) -> None:
    """As much more than one that keeps none as is predicted."""
    measured, predicted = [], []
    for plans in (lambda survey: ["keep"] * LAYERS, roomy):
        model, texts, found = planned(plans, trained=True)
        torch.use_deterministic_algorithms(False)
        chosen = [survey.point(Choice.parse(text), Sizes(survey.compiled_for)) for survey, text in zip(found, texts, strict=True)]
        gradients = [sum(p.nbytes for p in block.parameters()) for block in model.model.layers]
        predicted.append(peak_of(chosen, gradients, held=Held(leaf=True, outputs=2 * UNIT)).total)
        measured.append([most_allocated(model) for _ in range(2)][-1])  # the first profile of a process is of more than the step
    assert chosen[-1].saved_bytes - chosen[0].saved_bytes == LENGTH * HIDDEN * 2 + 2 * UNIT  # the gate's, and those of two norms
    assert predicted[1] - predicted[0] > 6 * UNIT
    assert measured[1] - measured[0] == pytest.approx(predicted[1] - predicted[0], rel=0.01)
