"""Sums of products: what is recognised, what becomes of it, and what must be left alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfuse.backend as backend
from fxfuse.products import augmented, check, thin_sums
from fxfuse.products.augmented import gain
from fxfuse.products.calls import accumulate, below, beside, columns, product, thin_pair, with_room
from fxfuse.reporting.records import GraphRecord
from fxfuse.roomy_weights import row_distance
from tests.adapted_modules import Adapted, Attentionlike, GatedMLP, Kinds, compiled, ratios, sites

WIDTH, RANK = 64, 8


@pytest.fixture
def matrices() -> dict[str, Tensor]:
    torch.manual_seed(1)
    shapes = dict(x=(2, 20, WIDTH), w=(96, WIDTH), a=(RANK, WIDTH), b=(96, RANK), bias=(96,), wide=(96, 48), narrow=(48, WIDTH))
    return {name: torch.randn(*shape, requires_grad=True) for name, shape in shapes.items()}


LORA: dict[str, Callable[..., Tensor]] = {
    "plain": lambda x, w, a, b, **_: F.linear(x, w) + F.linear(F.linear(x, a), b) * 2.0,
    "other order": lambda x, w, a, b, **_: 2.0 * F.linear(F.linear(x, a), b) + F.linear(x, w),
    "divided": lambda x, w, a, b, **_: F.linear(x, w) + F.linear(F.linear(x, a), b) / 4,
    "bias": lambda x, w, a, b, bias, **_: F.linear(x, w, bias) + F.linear(F.linear(x, a), b) * 0.3,
    "method": lambda x, w, a, b, **_: F.linear(x, w).add(F.linear(F.linear(x, a), b).mul(2.0)),
    "in place": lambda x, w, a, b, **_: F.linear(x, w).add_(F.linear(F.linear(x, a), b).mul_(2.0)),
    "cloned base": lambda x, w, a, b, **_: F.linear(x, w).clone() + F.linear(F.linear(x, a), b),
    "wide cast away": lambda x, w, a, b, **_: F.linear(x, w) + F.linear(F.linear(x.double().float(), a), b) * 2.0,
    "twice": lambda x, w, a, b, **_: F.linear(x, w) + F.linear(F.linear(x, a), b) * 2.0 + F.linear(F.linear(x, -a), b) * 0.5,
}


def traced(function: Callable[..., Tensor], operands: dict[str, Tensor], **options: Any) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients of the compiled function; the same of the function itself are equal to rounding."""

    class Run(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterDict({name: nn.Parameter(value) for name, value in operands.items() if name != "x"})

        def forward(self, x: Tensor) -> Tensor:
            # (Dynamo of 2.11 cannot unpack a ParameterDict.)
            return function(x=x, **{name: self.weights[name] for name in operands if name != "x"})

    run = Run()
    wanted = [operands["x"], *run.parameters()]
    fused = torch.compile(run, backend=backend.Backend(remainder="eager", strict=True, **options), fullgraph=True, dynamic=True)
    results = []
    for call in (fused, run):
        y = call(operands["x"])
        results.append([y, *torch.autograd.grad(y.square().sum(), wanted, allow_unused=True)])
    for ours, eager in zip(*results, strict=True):
        assert (ours is None) == (eager is None)
        if ours is not None:
            torch.testing.assert_close(ours, eager, rtol=2e-4, atol=2e-4 * float(eager.abs().max()))
    return results[0][0], results[0][1:]


@pytest.mark.parametrize("name", LORA)
def test_recognised(name: str, matrices: dict[str, Tensor], records: list[GraphRecord]) -> None:
    traced(LORA[name], matrices)
    found = [site for site in records[-1].sites if site.rule == "lora_linear"]
    assert len(found) == (2 if name == "twice" else 1)
    assert {site.implementation for site in found} == {"addmm_"}
    if name != "twice":  # (its -a is a product of numbers)
        for source in (records[-1].forward_source, records[-1].backward_source):
            assert not re.search(r"aten\.(add|mul)\.", source)


NEAR_MISSES: dict[str, tuple[Callable[..., Tensor], str]] = {
    "no matmul to add to": (lambda x, a, b, **_: x[..., :1] * torch.ones(96) + F.linear(F.linear(x, a), b), "result of a matmul"),
    "activated": (lambda x, w, a, b, **_: F.linear(x, w) + F.silu(F.linear(F.linear(x, a), b)), ""),
    "rank not small": (lambda x, w, narrow, wide, **_: F.linear(x, w) + F.linear(F.linear(x, narrow), wide), ""),
    "read elsewhere": (lambda x, w, a, b, **_: (lambda h: F.linear(x, w) + h + h.tanh())(F.linear(F.linear(x, a), b)), ""),
    "thin bias": (lambda x, w, a, b, bias, **_: F.linear(x, w) + F.linear(F.linear(x, a), b, bias), ""),
    "learned factor": (lambda x, w, a, b, bias, **_: F.linear(x, w) + F.linear(F.linear(x, a), b) * bias, ""),
    "broadcast": (lambda x, w, a, b, **_: F.linear(x[:, :1], w) + F.linear(F.linear(x, a), b), "broadcasts"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_left(name: str, matrices: dict[str, Tensor], records: list[GraphRecord]) -> None:
    function, reason = NEAR_MISSES[name]
    traced(function, matrices)
    found = [site for site in records[-1].sites if site.rule == "lora_linear"]
    assert all(site.status == "declined" for site in found)
    assert bool(found) == bool(reason)
    assert all(reason in site.reason for site in found)


def test_shared_inputs_are_read_once(records: list[GraphRecord]) -> None:
    module = Kinds().prepare(Attentionlike())
    x = torch.randn(2, 30, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    compiled(module)(x).sum().backward()
    forward, backward = records[-1].forward_source, records[-1].backward_source
    assert forward.count("aten.mm") == 2  # x A' of three as one, and of the other
    # s h B', one of them added to x, which goes by; and the wide products added to these
    assert forward.count("calls_product(") + forward.count("aten.addmm.") == forward.count("calls_accumulate(") == 4
    assert backward.count("aten.mm") == 2  # dA of three as one, dA of the other
    assert backward.count("calls_accumulate(") == 4  # the wide products of dX, added to thin ones
    assert (forward.count("aten.add."), backward.count("aten.add.")) == (0, 0)  # nor of the gradient that goes by (memory/absorb.py)
    assert sites(records[-1], "shared_input_linears") == [""]


class Passing(nn.Module):
    """An adapted linear and a stream that goes by it: as it comes, or made into something that does not lie as the result does."""

    def __init__(self, passes: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.passes = Adapted(WIDTH, WIDTH), passes

    def forward(self, x: Tensor) -> Tensor:
        return self.passes(x) + self.linear(torch.tanh(x))


def test_a_stream_that_goes_by_is_read_where_the_thin_term_is_written(records: list[GraphRecord]) -> None:
    found = ratios(Passing(lambda x: x), Kinds())
    assert max(found.values()) <= 2.0, found
    forward = records[0].forward_source
    assert re.search(r"calls_accumulate\(addmm", forward)
    assert "aten.add." not in forward
    assert "calls_product(" not in forward


@pytest.mark.parametrize("passes", [lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), lambda x: x[:, :1], lambda x: x.float()],
                         ids=["other rows first", "one row for all", "float32"])  # fmt: skip
def test_a_stream_that_lies_otherwise_is_added(passes: Callable[[Tensor], Tensor], records: list[GraphRecord]) -> None:
    found = ratios(Passing(passes), Kinds())
    assert max(found.values()) <= 2.0, found
    assert "aten.addmm." not in records[0].forward_source


def test_a_bias_goes_with_the_thin_term(records: list[GraphRecord]) -> None:
    module = Kinds().prepare(Attentionlike(bias=True))
    x = torch.randn(2, 30, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    compiled(module)(x).sum().backward()
    forward = records[-1].forward_source
    assert forward.count("aten.addmm.default(") == forward.count("calls_accumulate(") == 4
    assert "calls_product(" not in forward


@pytest.mark.parametrize("kinds", [Kinds(), Kinds(adapters=torch.float32, autocast=True)], ids=str)
def test_gradients_of_an_adapter_read_the_gradient_of_its_output_once(kinds: Kinds, records: list[GraphRecord]) -> None:
    module = kinds.prepare(Attentionlike(casts=kinds.autocast))
    x = torch.randn(2, 30, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=kinds.autocast):
        y = compiled(module)(x)
    y.sum().backward()
    backward = records[-1].backward_source
    assert backward.count("calls_thin_pair(") == 4  # dY B and dY' h, of each linear
    assert backward.count("calls_product(") == 2  # what the sums of dX begin with
    assert "calls_columns(" not in backward
    assert backward.count("torch.float32") == (4 if kinds.autocast else 0)  # dA alone is cast; dB comes out so


def test_a_wrong_pair_is_not_used(monkeypatch: pytest.MonkeyPatch, records: list[GraphRecord]) -> None:
    from fxfuse.products import pairs

    monkeypatch.setattr(pairs, "thin_pair", _with_the_other_factor)
    monkeypatch.setattr(check, "_verdicts", {})
    x = torch.randn(2, 30, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    compiled(Kinds().prepare(GatedMLP()))(x).sum().backward()
    assert "_with_the_other_factor" not in records[-1].backward_source


def _with_the_other_factor(buffer, start, width, matrix, right, left, alpha, beta, wide) -> tuple[Tensor, Tensor]:
    return thin_pair(buffer, start, width, matrix, right, left, alpha, 1.02 * beta, wide)


def test_dropout_has_a_mask_for_each_linear(records: list[GraphRecord]) -> None:
    module = Kinds().prepare(Attentionlike(dropout=0.5))
    x = torch.randn(2, 30, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    compiled(module)(x).sum().backward()
    assert records[-1].forward_source.count("aten.native_dropout.default(") == 4
    assert "cat" not in records[-1].forward_source


@pytest.mark.parametrize(("rule", "gone"), [("lora_linear", "calls_accumulate"), ("shared_input_linears", "aten.cat")])
def test_rules_can_be_excluded(rule: str, gone: str, records: list[GraphRecord]) -> None:
    module = Kinds().prepare(GatedMLP())
    x = torch.randn(2, 30, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    compiled(module, exclude=(rule,))(x).sum().backward()
    assert gone not in records[-1].forward_source
    assert not sites(records[-1], rule)
    if rule == "lora_linear":
        assert sites(records[-1], rule, "declined")


@pytest.mark.parametrize("make", [Attentionlike, GatedMLP])
@pytest.mark.parametrize("options", [{}, dict(bias=True), dict(dropout=0.1)], ids=str)
def test_augmented(make: type, options: dict, monkeypatch: pytest.MonkeyPatch, records: list[GraphRecord]) -> None:
    monkeypatch.setattr(augmented, "LEAST", 0)
    monkeypatch.setattr(augmented, "COPY", 0.0)
    found = ratios(make(**options), Kinds())
    assert max(found.values()) < 2.2
    found_by = {site.module: site.implementation for site in records[-1].sites if site.rule == "lora_linear"}
    last = found_by.pop("o" if make is Attentionlike else "down")  # beside which the residual stream goes by
    assert set(found_by.values()) == {"augmented"}
    assert last == ("augmented" if options.get("bias") else "addmm_")
    assert ("rooms = [" in records[-1].forward_source) == ("dropout" not in options)  # dropout reads x packed
    assert "aten.add.Tensor(view" not in records[-1].backward_source


def test_what_is_saved_does_not_hold_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augmented, "LEAST", 0)
    monkeypatch.setattr(augmented, "COPY", 0.0)
    module = Kinds().prepare(GatedMLP())
    x = torch.randn(2, 30, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        compiled(module)(x)
    known = {p.untyped_storage()._cdata for p in module.parameters()}
    assert max(t.untyped_storage().nbytes() for t in held if t.untyped_storage()._cdata not in known) == 60 * 112 * 2


def test_narrow_projections_are_not_thin(records: list[GraphRecord]) -> None:
    """Keys and values of grouped attention, of a quarter of the input's width: each keeps a matmul and a contiguous result."""

    class KeysAndValues(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k, self.v = nn.Linear(2048, 512, bias=False), nn.Linear(2048, 512, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.k(x) * self.v(x)

    x = torch.randn(8, 2048, requires_grad=True)
    compiled(KeysAndValues(), validate="off")(x).sum().backward()
    assert "aten.cat" not in records[-1].forward_source
    site, = [site for site in records[-1].sites if site.rule == "shared_input_linears"]
    assert site.implementation == "addmm_"


def test_augmenting_is_a_count_of_bytes() -> None:
    assert gain(8192, 4096, 14336, 16, True, True) > 0
    assert gain(8192, 4096, 14336, 16, True, False) < 0  # a copy of W costs more than going over the result again
    assert gain(8192, 18944, 3584, 16, False, True) < 0  # one of x is not
    assert gain(64, 4096, 4096, 16, True, True) == 0.0  # launches count, not bytes


def test_calls() -> None:
    torch.manual_seed(0)
    a, b, w, t = torch.randn(5, 7), torch.randn(7, 4), torch.randn(6, 7), torch.randn(6, 2)
    torch.testing.assert_close(product(a, b, 0.5), 0.5 * a @ b)
    buffer = columns(columns(None, a, b, 2.0, 0, 8), a, b, -1.0, 4, 8)
    torch.testing.assert_close(buffer, torch.cat([2 * a @ b, -(a @ b)], 1))
    torch.testing.assert_close(accumulate(torch.ones(5, 4), a, b, 3.0), 1 + 3 * a @ b)
    torch.testing.assert_close(beside(w, t, 2.0, 1, 4, False), torch.cat([w, torch.zeros(6, 1), 2 * t, torch.zeros(6, 1)], 1))
    torch.testing.assert_close(below(w, torch.ones(2, 7), 2.0, 0, 2, True), torch.cat([w, torch.full((2, 7), 2.0)]))
    roomy = torch.zeros(5, row_distance(7, 2))
    inside = roomy[:, :7].copy_(a)
    assert with_room(inside, 2, True).data_ptr() == roomy.data_ptr()
    assert with_room(inside, 2, False).data_ptr() != roomy.data_ptr()
    assert with_room(inside, 2, True).shape == (5, 9)
    assert with_room(inside, 12, True).shape == (5, 19)


FAULTS: dict[str, Callable[[Any], Any]] = {
    "wrong factor": lambda term: type(term)(term.product, term.factor * 1.01, term.between),
    "sign": lambda term: type(term)(term.product, -term.factor, term.between),
    "lost factor": lambda term: type(term)(term.product, 1.0, term.between),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_rewrite_is_not_used(fault: str, monkeypatch: pytest.MonkeyPatch, matrices: dict[str, Tensor],
                                     records: list[GraphRecord]) -> None:
    read = thin_sums.read_thin_term
    monkeypatch.setattr(thin_sums, "read_thin_term", lambda operand: (t := read(operand)) and FAULTS[fault](t))
    traced(LORA["plain"], matrices)
    site, = [site for site in records[-1].sites if site.rule == "lora_linear"]
    assert site.status == "declined"
    assert "times as far from float64" in site.reason


def test_a_wrong_arrangement_is_not_used(monkeypatch: pytest.MonkeyPatch, matrices: dict[str, Tensor],
                                         records: list[GraphRecord]) -> None:
    """B the wrong way round, in effect: the accumulated product is of another matrix."""
    from fxfuse.products import accumulation

    monkeypatch.setattr(accumulation, "accumulate", _wrongly)
    monkeypatch.setattr(check, "_verdicts", {})
    traced(LORA["plain"], matrices)
    assert "_wrongly" not in records[-1].forward_source


def _wrongly(buffer: Tensor, left: Tensor, right: Tensor, alpha: float) -> Tensor:
    return buffer.addmm_(left, right.flip(0), alpha=alpha)


def test_validation_can_be_off(monkeypatch: pytest.MonkeyPatch, matrices: dict[str, Tensor], records: list[GraphRecord]) -> None:
    monkeypatch.setattr(check, "_judge", lambda *_: pytest.fail("checked"))
    traced(LORA["plain"], matrices, validate="off")
    assert sites(records[-1], "lora_linear")


def test_a_module_without_adapters_accumulates_its_gradients(records: list[GraphRecord]) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, 48), nn.Linear(WIDTH, 48)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * self.b(x)

    module, x = Two(), torch.randn(30, WIDTH, requires_grad=True)
    ours, = torch.autograd.grad(compiled(module)(x).sum(), x)
    eager, = torch.autograd.grad(module(x).sum(), x)
    torch.testing.assert_close(ours, eager)
    assert "calls_accumulate" in records[-1].backward_source
    assert sites(records[-1], "shared_input_linears")
