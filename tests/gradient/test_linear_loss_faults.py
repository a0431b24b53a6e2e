"""Faults that a fused loss head could have: each is found before it is used, or by the tests of its gradients."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fxfuse import validation
from fxfuse.linear_loss import adjoint, chunks, execution, op, products, surgery
from fxfuse.program import Program, parse
from tests.gradient import loss_heads
from tests.gradient.loss_heads import Head, worst_ratio


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials run in two chunks."""
    monkeypatch.setattr(chunks, "LOGITS_BYTES", 1)
    monkeypatch.setattr(chunks, "WEIGHT_SHARE", 0.0)


def lost_ignored_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ignored rows count, as rows of class 0: what is 1 where a row counts is 1 everywhere."""
    original = adjoint.loss_and_gradient

    def faulty(program: Program, logits: str, weighted: bool) -> Program:
        text = str(original(program, logits, weighted))
        one, zero = (re.search(rf"(%\d+) = const {number}$", text, re.MULTILINE)[1] for number in ("1.0", "0.0"))  # type: ignore
        return parse(re.sub(rf"select %\d+ {one} {zero}$", f"add {one} {zero}", text, flags=re.MULTILINE))

    monkeypatch.setattr(execution, "loss_and_gradient", faulty)


def mean_without_division(monkeypatch: pytest.MonkeyPatch) -> None:
    original = surgery._reduced
    monkeypatch.setattr(surgery, "_reduced", lambda graph, view, total, values: original(
        graph, surgery.replace(view, loss_reduction=2), total, values))


def labels_of_the_row_before(monkeypatch: pytest.MonkeyPatch) -> None:
    original = execution.Head.__init__

    def faulty(self: execution.Head, hidden: Tensor, weight: Tensor, bias: Tensor | None, others: list[Tensor], *rest: object) -> None:
        original(self, hidden, weight, bias, [t.roll(1, 0) if t.dtype == torch.int64 else t for t in others], *rest)  # type: ignore

    monkeypatch.setattr(execution.Head, "__init__", faulty)


def cotangent_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "_times", lambda stored, factor, dtype, by_row: stored.detach().to(dtype, copy=True))


def only_the_last_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    original = execution.accumulate
    monkeypatch.setattr(execution, "accumulate", lambda product, a, b, into, first: original(product, a, b, into, True))


def bias_gradient_of_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    original = execution.Gradients.add

    def faulty(self: execution.Gradients, gradient: Tensor, chunk: chunks.Chunk, x: Tensor) -> None:
        before = None if self.bias is None else self.bias.clone()
        original(self, gradient, chunk, x)
        if before is not None and self.bias is not None:
            self.bias.copy_(before + gradient[0])

    monkeypatch.setattr(execution.Gradients, "add", faulty)


FAULTS: list[Callable[[pytest.MonkeyPatch], None]] = [
    lost_ignored_rows, mean_without_division, labels_of_the_row_before, cotangent_left_out, only_the_last_chunk,
    bias_gradient_of_one_row,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_validation_finds(fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """A site with a fault is left as it was, and the report has the measurement."""
    from fxfuse.backend import Backend, new_record

    module = Head(loss_heads.mean, biased=True).module()
    sites = []

    def backend(gm: torch.fx.GraphModule, example_inputs: object) -> Callable[..., object]:
        record = new_record()
        Backend(rules=("linear_loss",)).rewrite(gm, record)
        sites.extend(record.sites)
        return gm.forward

    fault(monkeypatch)
    validation.forget_verdicts()
    torch.compile(module, backend=backend, dynamic=True)(module.hidden.requires_grad_(), module.labels)
    validation.forget_verdicts()
    site = next(site for site in sites if site.rule == "linear_loss")
    assert site.status == "declined"
    assert "times as far from float64" in site.reason


def test_a_weight_gradient_added_up_in_bfloat16_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "accumulator_dtype", lambda dtype: dtype)
    assert products.accumulator_dtype(torch.bfloat16) == torch.float32
    assert worst_ratio(Head(loss_heads.mean, torch.bfloat16), batch=16, length=256) > 1


def test_a_shift_by_one_row_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    original = surgery._rows

    def faulty(graph: torch.fx.Graph, *rest: object) -> tuple[torch.fx.Node, list[object]]:
        hidden, sizes = original(graph, *rest)  # type: ignore[arg-type]
        return surgery.call(graph, hidden, torch.ops.aten.roll.default, hidden, [1], [0]), sizes

    monkeypatch.setattr(surgery, "_rows", faulty)
    assert worst_ratio(Head(loss_heads.sliced)) > 1
