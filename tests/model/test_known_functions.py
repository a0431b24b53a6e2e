"""A 4-bit linear is traced by its forward alone, and only where its derivative is put into its place afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse._torch import AutogradFunctionVariable
from fxfuse.backend import Backend
from fxfuse.capture import known_functions
from fxfuse.reporting.records import attached

bitsandbytes = pytest.importorskip("bitsandbytes")


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter]:
    """How many linears were traced the short way, how many with both bodies."""
    counts: Counter[str] = Counter()
    in_full, note = known_functions._of_dynamo, dict.__setitem__

    class Noted(dict):
        def __setitem__(self, key, value) -> None:
            counts["short"] += 1
            note(self, key, value)

    def both(*given) -> object:
        counts["in full"] += 1
        return in_full(*given)

    monkeypatch.setattr(known_functions, "_short", Noted())
    monkeypatch.setattr(known_functions, "_of_dynamo", both)
    torch._dynamo.reset()
    yield counts
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self, module: str = "Linear4bit") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.RMSNorm(64, eps=1e-6)
        self.up = bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.norm(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def model() -> nn.Module:
    built = Model().to("cpu").train()
    for layer in built.layers:
        layer.up.weight.requires_grad_(False)
        if layer.up.weight.quant_state is None:
            layer.up.weight = layer.up.weight.to("cpu")
    return built


def outcome(run: nn.Module) -> list[Tensor]:
    x = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    output = run(x)
    output.square().sum().backward()
    return [output.detach(), x.grad, *(p.grad for p in run.parameters() if p.grad is not None)]


def close(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def test_the_forward_alone_is_traced(traced: Counter) -> None:
    eager = outcome(model())
    ours = fxfuse.optimize(model())
    assert close(outcome(ours), eager)
    assert traced == {"short": 1}
    assert [site.count for site in fxfuse.report(ours).sites if site.rule == "nf4_linear"] == [2]


def test_a_rule_that_is_left_out_begins_anew(traced: Counter) -> None:
    eager = outcome(model())
    ours = fxfuse.optimize(model(), exclude=("nf4_linear",))
    assert close(outcome(ours), eager)
    assert traced == {"short": 1, "in full": 1}
    sites = [site for site in fxfuse.report(ours).sites if site.rule == "nf4_linear"]
    assert [(site.status, site.count) for site in sites] == [("declined", 2)]


def test_a_weight_that_is_not_read_begins_anew(traced: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxfuse.quantized_linears._differs", lambda *kind, again: "its kernel differs")
    eager = outcome(model())
    assert close(outcome(fxfuse.optimize(model())), eager)
    assert traced == {"short": 1, "in full": 1}


def test_a_graph_that_cannot_be_rewritten_begins_anew(traced: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: rewriting fails, and the graph runs as it was traced."""
    def broken(*given: object) -> object:
        raise RuntimeError("planted")

    monkeypatch.setattr("fxfuse.backend.rewrite_graph", broken)
    eager = outcome(model())
    assert close(outcome(fxfuse.optimize(model())), eager)
    assert traced == {"short": 1, "in full": 1}


def graphs(run: nn.Module) -> list[str]:
    outcome(run)
    records = {id(record): record for module in run.modules() for record in attached(module)}
    return [record.forward_source + record.backward_source for record in records.values()]


def test_both_ways_lead_to_the_same_graphs(traced: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    short = graphs(fxfuse.optimize(model()))
    torch._dynamo.reset()
    monkeypatch.setattr(known_functions, "_is_known", lambda function: False)
    assert graphs(fxfuse.optimize(model())) == short
    assert traced == {"short": 1, "in full": 1}


class Checkpointed(Block):
    """Its linear is in the body of an operation of the graph."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)


@pytest.mark.parametrize("left_out", [(), ("nf4_linear",)])
def test_a_body_inside_a_graph_is_looked_at(traced: Counter, monkeypatch: pytest.MonkeyPatch, left_out: tuple[str, ...]) -> None:
    monkeypatch.setattr(f"{__name__}.Block", Checkpointed)
    eager = outcome(model())
    assert close(outcome(fxfuse.optimize(model(), exclude=left_out)), eager)
    assert traced["short"] >= 1
    assert ("in full" in traced) == bool(left_out)


def test_another_backend_traces_both_bodies(traced: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    """The setting holds for all of Dynamo while a captured block is compiled; others' graphs are theirs."""
    monkeypatch.setattr(AutogradFunctionVariable, "call_apply", known_functions.call_apply)
    eager = outcome(model())
    assert close(outcome(torch.compile(model(), backend="aot_eager")), eager)
    assert traced["short"] == 0 < traced["in full"]


def test_a_class_that_says_more_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    function = bitsandbytes.autograd._functions.MatMul4Bit
    assert known_functions._is_known(function)

    def backward(ctx, grad_output):
        return torch.tanh(grad_output), None, None, None, None

    backward.__module__ = function.__module__
    monkeypatch.setattr(function, "backward", staticmethod(backward))
    assert not known_functions._is_known(function)


def test_backends_are_equal_as_before() -> None:
    assert Backend() == Backend()
    assert "looks_again" not in repr(Backend())
