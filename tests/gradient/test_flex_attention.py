"""Attention by FlexAttention's ops (dense on a CPU): which programs, values and gradients, and what goes over chunks instead."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fxfuse.attention import choice, execution, flex, fuse, layouts
from fxfuse.attention.blocks import blocks_of, narrowed
from fxfuse.attention.execution import Attention
from fxfuse.attention.flex import BACKWARD, FORWARD, Form, Kernel, Request
from fxfuse.attention.known_masks import forget_masks
from fxfuse.attention.prepared import prepared
from fxfuse.attention.programs import with_statistics
from fxfuse.attention.softmax import softmax_of
from fxfuse.attention.ways import CHUNKS, FLEX, forms
from fxfuse.backend import Backend
from fxfuse.validation import error_ratio
from tests.gradient.test_attention import capped, causal, operands, plain, program, results

REAL_COMPILED = flex.compiled
LEAST = torch.finfo(torch.float32).min


def fake_kernel(asked: Request, ran: list[str]) -> Kernel:
    """In place of kernels that there are for GPUs alone. (The higher-order op's dense form cannot run inside of an op.)"""
    softmax = softmax_of(asked.text, asked.scores)
    assert softmax is not None

    def run(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        assert tuple(map(Form.of, tensors)) == asked.forms
        ran.append(asked.direction)
        (query, key, value, *more), mask = tensors[: asked.count], tensors[-1]
        call = Attention(query, key, value, [mask], prepared(asked.text, asked.scores))
        if asked.direction == FORWARD:
            out, *numbers = execution.forward(call)
            named = dict(zip(call.prepared.statistics, numbers, strict=True))
            return out, ((named[softmax.maximum] + named[softmax.total].log()) / math.log(2)).squeeze(-1)
        _, lse, arriving = more
        maximum = (lse * math.log(2)).unsqueeze(-1)
        named = {softmax.maximum: maximum, softmax.total: torch.ones_like(maximum)}
        return execution.backward(call, arriving, [named[name] for name in call.prepared.statistics])

    return run


@pytest.fixture(autouse=True)
def by_flex(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """FlexAttention wherever it can; returns the directions that it ran in."""
    ran: list[str] = []
    monkeypatch.setattr(flex, "compiled", lambda asked: fake_kernel(asked, ran))
    monkeypatch.setattr(fuse, "why_not_flex", lambda text, scores, *_: "" if softmax_of(text, scores) else "no softmax")
    monkeypatch.setattr(layouts, "_layouts", {})
    monkeypatch.setattr(layouts, "_compiled", Counter())
    monkeypatch.setattr(layouts, "_now", layouts._Now())
    monkeypatch.setenv("FXFUSE_ATTENTION", "flex")
    forget_masks()
    torch._dynamo.reset()
    return ran


def compiled(function):
    return torch.compile(function, backend=Backend(strict=True, rules=("attention",)), fullgraph=True, dynamic=True)


@pytest.mark.parametrize(("function", "mask"), [
    (capped, causal()), (capped, causal(window=20)), (plain, causal()),
])
def test_as_near_to_float64_as_eager(function, mask: Tensor, by_flex: list[str]) -> None:
    inputs = operands(torch.float32)
    truth = results(function, [t.detach().double().requires_grad_() for t in inputs], mask.double())
    for a, b, t in zip(results(compiled(function), inputs, mask), results(function, inputs, mask), truth, strict=True):
        assert error_ratio(a, b, t) <= 2  # exp(x - log sum) rounds the logarithm, as the kernels do
    assert by_flex == ["forward", "backward"]


@pytest.mark.parametrize("mask", [
    causal() + torch.linspace(0, 1, 70),  # a bias that reads as a mask
    torch.where(torch.arange(70)[:, None] == 3, LEAST, causal()),  # a query that sees nothing
])
def test_masks_that_do_more_than_hide_go_over_chunks(mask: Tensor, by_flex: list[str]) -> None:
    inputs = operands(torch.float32)
    for a, b in zip(results(compiled(capped), inputs, mask), results(capped, inputs, mask), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    assert by_flex == []


@pytest.mark.parametrize("allowed", [FORWARD, BACKWARD])
def test_either_backward_follows_either_forward(allowed: str, monkeypatch: pytest.MonkeyPatch, by_flex: list[str]) -> None:
    """Two numbers a row mean the same whoever wrote them."""
    ready = layouts.ready
    monkeypatch.setattr(layouts, "ready", lambda direction, *a: ready(direction, *a) if direction == allowed else None)
    inputs, mask = operands(torch.float32), causal()
    for a, b in zip(results(compiled(capped), inputs, mask), results(capped, inputs, mask), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    assert by_flex == [allowed]


def steps_of_lengths(*lengths: int) -> None:
    """A step with each length, right in every one."""
    fused = compiled(capped)
    for length in lengths:
        inputs = [t.detach()[:, :, :length].requires_grad_() for t in operands(torch.float32)]
        mask = causal()[..., :length, :length]
        for a, b in zip(results(fused, inputs, mask), results(capped, inputs, mask), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_many_layouts_are_not_compiled(monkeypatch: pytest.MonkeyPatch, by_flex: list[str]) -> None:
    monkeypatch.setattr(layouts, "MOST_COMPILED", 1)
    steps_of_lengths(32, 48)
    assert by_flex == ["forward", "backward"]


def weights(s: Tensor, m: Tensor) -> Tensor:
    return torch.softmax(torch.tanh(s / 50) * 50 + m, -1)


def of_sigmoids(s: Tensor, m: Tensor) -> Tensor:
    """Weights that are no softmax."""
    values = torch.sigmoid(s + m)
    return values / values.sum(-1, keepdim=True)


def text_of(function) -> tuple[str, str]:
    found, scores = program(function, m=torch.zeros(2, 1, 8, 12))
    return str(with_statistics(found, scores)), scores


def test_what_is_no_softmax_of_scores() -> None:
    assert softmax_of(*text_of(weights)) is not None
    assert softmax_of(*text_of(of_sigmoids)) is None


@pytest.mark.parametrize("window", [200, 60])
def test_the_ops_that_are_compiled_give_the_same(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their dense form, outside of any graph."""
    text, scores = text_of(weights)
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(1, 200, heads, 16, generator=generator).transpose(1, 2) for heads in (4, 2, 2, 4))
    mask = (torch.full((200, 200), LEAST).triu(1) + torch.full((200, 200), LEAST).tril(-window))[None, None]
    blocks, whole = blocks_of(mask, None), flex.expanded(mask, q, k)
    assert blocks.usable
    asked = [flex.request(d, text, scores, forms(d, (q, k, v)), blocks, Form.of(whole)) for d in (FORWARD, BACKWARD)]
    forward, backward = map(REAL_COMPILED, asked)
    out, lse = flex.run(forward, (q, k, v), blocks, whole)
    found = [out, *flex.run(backward, (q, k, v, out, lse, g), blocks, whole)]
    call = Attention(q, k, v, [mask], prepared(text, scores))
    expected, *numbers = execution.forward(call)
    for a, b in zip(found, [expected, *execution.backward(call, g, numbers)], strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
def test_what_inductor_gets_can_be_kept_on_disk(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs inside of it too: a text among their globals (a type that was written as one) cannot be imported again."""
    traced: list[torch.fx.GraphModule] = []
    make = flex.make_fx

    def remembering(function):
        return lambda *tensors: traced.append(make(function)(*tensors)) or traced[-1]

    monkeypatch.setattr(flex, "make_fx", remembering)
    REAL_COMPILED.__wrapped__(requests_of(some_mask())[direction])
    graphs = [module for module in traced[0].modules() if isinstance(module, torch.fx.GraphModule)]
    assert len(graphs) > 2
    for graph in graphs:
        graph.__reduce__()
        assert not [value for value in graph.graph.python_code("self").globals.values() if isinstance(value, str)]


def requests_of(mask: Tensor) -> dict[str, Request]:
    """Kernels of a layout, by direction."""
    text, scores = text_of(weights)
    q, k, v = (torch.empty(2, 150, heads, 16).transpose(1, 2) for heads in (4, 2, 2))
    whole, blocks = flex.expanded(mask, q, k), blocks_of(narrowed(mask), None)
    return {d: flex.request(d, text, scores, forms(d, (q, k, v)), blocks, Form.of(whole)) for d in (FORWARD, BACKWARD)}


@pytest.fixture
def room_for_a_logarithm(monkeypatch: pytest.MonkeyPatch) -> None:
    """One direction each way: the logarithm of a sum is rounded once more, which float32 shows and 16 bits do not."""
    monkeypatch.setitem(choice.LIMITS, torch.float32, 3.0)
    monkeypatch.setattr(flex, "compiled", REAL_COMPILED)


def some_mask() -> Tensor:
    return torch.full((150, 150), LEAST).triu(1).expand(2, 1, -1, -1)


@pytest.mark.parametrize(("faster", "expected"), [
    ((FORWARD, BACKWARD), "FlexAttention"), ((FORWARD,), "FlexAttention forward, chunks of queries"),
    ((BACKWARD,), "FlexAttention backward, chunks of queries"), ((), "chunks of queries"),
])  # fmt: skip
def test_each_direction_takes_what_was_faster(faster: tuple[str, ...], expected: str, room_for_a_logarithm: None,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    order = iter([2.0, 1.0 if FORWARD in faster else 3.0, 2.0, 1.0 if BACKWARD in faster else 1.95])
    monkeypatch.setattr(choice, "milliseconds", lambda run: run() and next(order))
    made = choice.measured(requests_of(some_mask()))
    assert str(made) == expected
    assert "times as large" not in made.words


def test_a_direction_without_a_kernel_goes_over_chunks(room_for_a_logarithm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    order = iter([2.0, 1.0, 2.0])
    monkeypatch.setattr(choice, "milliseconds", lambda run: run() and next(order))
    requests = requests_of(some_mask())
    del requests[BACKWARD]
    assert choice.measured(requests).ways == {FORWARD: FLEX, BACKWARD: CHUNKS}


def test_planted_an_error_in_the_faster_way_is_not_taken(room_for_a_logarithm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    order = iter([2.0, 1.0, 2.0, 1.0])
    monkeypatch.setattr(choice, "milliseconds", lambda run: run() and next(order))

    def wrong(asked: Request) -> Kernel:
        kernel = REAL_COMPILED(asked)
        return lambda tensors: [t * 1.001 for t in kernel(tensors)]

    monkeypatch.setattr(flex, "compiled", wrong)
    made = choice.measured(requests_of(some_mask()))
    assert str(made) == "chunks of queries"
    assert "times as large" in made.words
