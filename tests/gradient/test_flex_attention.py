"""Attention by FlexAttention's ops (dense on a CPU): which programs, values and gradients, and what goes over chunks instead."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fxfuse.attention import choice, execution, flex, flex_op, fuse
from fxfuse.attention.blocks import Blocks, blocks_of
from fxfuse.attention.execution import Attention
from fxfuse.attention.hiding import forget_masks
from fxfuse.attention.prepared import prepared
from fxfuse.attention.programs import with_statistics
from fxfuse.attention.softmax import Softmax, softmax_of
from fxfuse.backend import Backend
from fxfuse.validation import error_ratio
from tests.gradient.test_attention import capped, causal, operands, plain, program, results

REAL_RUN = flex._run
LEAST = torch.finfo(torch.float32).min


@pytest.fixture(autouse=True)
def by_flex(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """FlexAttention wherever it can; returns the directions that it ran in."""
    ran: list[str] = []

    def run(direction: str, softmax: Softmax, text: str, tensors: tuple[Tensor, ...], blocks: Blocks) -> tuple[Tensor, ...]:
        """In place of kernels that there are for GPUs alone. (The higher-order op's dense form cannot run inside of an op.)"""
        ran.append(direction)
        query, key, value, *more = tensors
        call = Attention(query, key, value, [blocks.mask], prepared(text, softmax.scores))
        if direction == "forward":
            out, *numbers = execution.forward(call)
            named = dict(zip(call.prepared.statistics, numbers, strict=True))
            return out, ((named[softmax.maximum] + named[softmax.total].log()) / math.log(2)).squeeze(-1)
        _, lse, arriving = more
        maximum = (lse * math.log(2)).unsqueeze(-1)
        named = {softmax.maximum: maximum, softmax.total: torch.ones_like(maximum)}
        return tuple(execution.backward(call, arriving, [named[name] for name in call.prepared.statistics]))

    monkeypatch.setattr(flex, "_run", run)
    monkeypatch.setattr(fuse, "chosen", lambda text, scores, *_: (choice.FLEX if softmax_of(text, scores) else choice.CHUNKS, ""))
    monkeypatch.setattr(flex_op, "_layouts", defaultdict(set))
    monkeypatch.setattr(flex_op, "_seen", defaultdict(Counter))
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


def test_either_backward_follows_either_forward(monkeypatch: pytest.MonkeyPatch, by_flex: list[str]) -> None:
    """Two numbers a row mean the same whoever wrote them."""
    usable = flex_op._usable
    inputs, mask = operands(torch.float32), causal()
    expected = results(capped, inputs, mask)
    for allowed in ("forward", "backward"):
        turn = iter((allowed == "forward", allowed == "backward"))
        monkeypatch.setattr(flex_op, "_usable", lambda *a, turn=turn: usable(*a) if next(turn) else None)
        torch._dynamo.reset()
        for a, b in zip(results(compiled(capped), inputs, mask), expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    assert by_flex == ["forward", "backward"]


def steps_of_lengths(*lengths: int) -> None:
    """A step with each length, right in every one."""
    fused = compiled(capped)
    for length in lengths:
        inputs = [t.detach()[:, :, :length].requires_grad_() for t in operands(torch.float32)]
        mask = causal()[..., :length, :length]
        for a, b in zip(results(fused, inputs, mask), results(capped, inputs, mask), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_many_layouts_are_not_compiled(monkeypatch: pytest.MonkeyPatch, by_flex: list[str]) -> None:
    monkeypatch.setattr(flex_op, "MOST_LAYOUTS", 1)
    monkeypatch.setattr(flex_op, "OFTEN", 1)
    steps_of_lengths(32, 48)
    assert by_flex == ["forward", "backward"]


def test_another_length_is_compiled_once_it_has_come_often(monkeypatch: pytest.MonkeyPatch, by_flex: list[str]) -> None:
    monkeypatch.setattr(flex_op, "OFTEN", 5)
    steps_of_lengths(32, 48, 64, 48, 48)
    assert by_flex == ["forward", "backward"] * 2  # the first length, and the third step of the second one


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
def test_the_ops_that_are_compiled_give_the_same(window: int) -> None:
    """In their dense form, outside of any graph."""
    text, scores = text_of(weights)
    softmax = softmax_of(text, scores)
    assert softmax is not None
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(1, 200, heads, 16, generator=generator).transpose(1, 2) for heads in (4, 2, 2, 4))
    mask = torch.full((200, 200), LEAST).triu(1) + torch.full((200, 200), LEAST).tril(-window)
    blocks = blocks_of(mask[None, None], None)
    assert blocks.usable
    out, lse = REAL_RUN("forward", softmax, text, (q, k, v), blocks)
    found = [out, *REAL_RUN("backward", softmax, text, (q, k, v, out, lse, g), blocks)]
    call = Attention(q, k, v, [mask[None, None]], prepared(text, scores))
    expected, *numbers = execution.forward(call)
    for a, b in zip(found, [expected, *execution.backward(call, g, numbers)], strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_on_a_cpu_it_is_not_chosen() -> None:
    text, scores = text_of(weights)
    sizes = choice.Sizes(2, 4, 2, 64, 64, 16, 16)
    assert choice.chosen(text, scores, sizes, torch.bfloat16, torch.device("cpu"))[0] == choice.CHUNKS


def test_it_is_measured_when_asked_and_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text, scores = text_of(weights)
    site = (text, scores, choice.Sizes(2, 4, 2, 64, 64, 16, 16), torch.bfloat16, torch.device("cuda"))
    measured: list[str] = []
    monkeypatch.setenv("FXFUSE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("FXFUSE_REMEMBER", "1")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a device")
    monkeypatch.setattr(choice, "_measure", lambda *_: measured.append("once") or [choice.FLEX, "faster"])
    for told, expected in (("", choice.UNMEASURED), ("measure", "faster"), ("", "faster"), ("chunks", "as FXFUSE_ATTENTION says")):
        monkeypatch.setenv("FXFUSE_ATTENTION", told)
        choice._known.cache_clear()
        assert choice.chosen(*site)[1] == expected
    assert measured == ["once"]
