"""How long lazy logits can be read, by whom, and what becomes of gradients that are asked of them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fxfuse.errors import DoubleBackwardError, OutputContractError
from fxfuse.output_contract.tensor import LazyTensor
from fxfuse.reporting.records import GraphRecord
from tests.model.builders import VOCABULARY
from tests.model.giving_up import GivesLogitsUp
from tests.model.lazy_heads import WIDTH, Cube, Model, PassOn, gradients, lazy, reads, recording, tokens  # noqa: F401


class TestUntilWhen:
    """A read too late is an error with a name, never another value."""

    @pytest.mark.parametrize("optimizer", [
        lambda p: torch.optim.SGD(p, 0.1), lambda p: torch.optim.AdamW(p, 0.1, foreach=True),
        lambda p: torch.optim.AdamW(p, 0.1, fused=True), lambda p: torch.optim.Adam(p, 0.1, foreach=False),
    ])
    def test_after_an_optimizer_step(self, optimizer: Callable) -> None:
        model = lazy()
        steps = optimizer(model.parameters())
        loss, logits = model(tokens())
        loss.backward()
        steps.step()
        with pytest.raises(OutputContractError, match=r"lm_head cannot be read: an optimizer step .*logits='always'"):
            logits.argmax(-1)
        assert logits.shape == (2, 5, VOCABULARY)
        assert "optimizer step" in repr(logits)

    def test_an_optimizer_of_other_weights_changes_nothing(self) -> None:
        model = lazy()
        steps = torch.optim.AdamW(model.body.parameters(), 0.1, fused=True)
        loss, logits = model(tokens())
        want = Model()(tokens())[1]
        loss.backward()
        steps.step()
        assert torch.equal(logits, want)

    @pytest.mark.parametrize("change", [
        lambda model: setattr(model.lm_head.weight, "data", torch.zeros(VOCABULARY, WIDTH)),
        lambda model: model.lm_head.weight.untyped_storage().resize_(0),
        lambda model: model.lm_head.weight.data.add_(1e-3),
    ], ids=["another storage", "a shard given back", "written through data"])
    def test_after_the_weight_changed_without_a_version(self, change: Callable) -> None:
        model = lazy()
        logits = model(tokens())[1]
        change(model)
        with pytest.raises(OutputContractError, match="changed or freed"):
            logits.argmax(-1)

    def test_what_was_read_before_stays(self) -> None:
        model = lazy()
        loss, logits = model(tokens())
        want = logits.argmax(-1)
        loss.backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        model(tokens())
        assert torch.equal(logits.argmax(-1), want)

    def test_after_the_next_forward(self) -> None:
        model = lazy()
        first = model(tokens())[1]
        second = model(tokens())[1]
        with pytest.raises(OutputContractError, match=r"ran forward again since.*logits='always'"):
            first.sum()
        assert "ran forward again" in repr(first)
        assert first.dtype == torch.float32
        assert torch.equal(second, Model()(tokens())[1])

    def test_nothing_is_held_past_the_next_forward(self) -> None:
        model = lazy()
        outputs = [model(tokens()) for _ in range(3)]  # gradient accumulation that keeps its outputs
        losses = [loss.detach() for loss, _ in outputs]
        logits = [each for _, each in outputs]
        del outputs
        gc.collect()
        assert [reference() is None for reference in model.hidden] == [True, True, False]
        assert [reference() is None for reference in model.history] == [True, True, False]
        assert len(losses) == len(logits) == 3

    def test_nothing_is_held_once_nobody_has_it(self) -> None:
        model = lazy()
        loss, logits = model(tokens())
        del loss, logits
        gc.collect()
        assert model.hidden[0]() is None

    @pytest.mark.parametrize("kept", [lambda x: x.float(), lambda x: x.detach(), lambda x: x.clone().double()])
    def test_nor_by_what_was_made_of_it(self, kept: Callable[[Tensor], Tensor]) -> None:
        model = lazy()
        made = kept(model(tokens())[1])
        model(tokens())
        gc.collect()
        assert model.hidden[0]() is model.history[0]() is None
        with pytest.raises(OutputContractError, match="ran forward again"):
            made.sum()


class TestWithoutGradients:
    @pytest.mark.parametrize("mode", ["lazy", "never"])
    @pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
    def test_they_are_real(self, mode: str, without: Callable) -> None:
        model = lazy(mode)
        with without():
            assert type(model(tokens())[1]) is Tensor

    @pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
    def test_a_read_in_such_a_region_has_no_history_and_a_later_one_has(self, without: Callable) -> None:
        model, eager = lazy(), Model()
        logits = model(tokens())[1]
        with without():
            best = logits.argmax(-1)
            assert not (logits * 2).requires_grad
            assert not logits.float().requires_grad or logits.dtype == torch.float32
        assert torch.equal(best, eager(tokens())[1].argmax(-1))
        got, want = gradients(model, logits.square().sum()), gradients(eager, eager(tokens())[1].square().sum())
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("transform", [torch.func.grad, lambda f: lambda x: torch.func.jvp(f, (x,), (torch.ones(()),))[1]])
def test_a_first_read_within_a_transform_of_functions(transform: Callable) -> None:
    found = []
    for model in (lazy(), Model()):
        logits = model(tokens())[1]
        slope = transform(lambda heat, logits=logits: (logits.detach() / heat).logsumexp(-1).sum())(torch.tensor(1.3))
        found.append([slope, logits[:].detach(), *gradients(model, logits.square().sum())])
    assert all(map(torch.equal, *found))


class TestModes:
    def test_always_gives_ordinary_logits(self, records: list[GraphRecord]) -> None:
        logits = lazy("always")(tokens())[1]
        assert type(logits) is Tensor
        assert records[0].reads == []

    def test_never_has_a_shape_and_no_value(self, records: list[GraphRecord]) -> None:
        model = lazy("never")
        loss, logits = model(tokens())
        assert (logits.shape, logits.float().dtype) == ((2, 5, VOCABULARY), torch.float32)
        for read in (lambda: logits.argmax(-1), lambda: logits.float().sum(), lambda: logits.tolist()):
            with pytest.raises(OutputContractError, match=r"logits='never'.*logits='always'"):
                read()
        assert "never" in repr(logits)
        assert str(records[0].reads[0]) == "logits of lm_head: never computed; reading them is an error"
        eager = Model()
        assert all(map(torch.equal, gradients(model, loss), gradients(eager, eager(tokens())[0])))

    def test_never_holds_nothing(self) -> None:
        model = lazy("never")
        loss, logits = model(tokens())
        del loss
        gc.collect()
        assert model.hidden[0]() is None
        assert logits.ndim == 3


class TestGradientsThatWouldNeverArrive:
    @pytest.mark.parametrize("wait", [
        lambda loss, x: x.retain_grad(), lambda loss, x: x.register_hook(print),
        lambda loss, x: torch.autograd.grad(loss, x, allow_unused=True), lambda loss, x: torch.autograd.grad(loss, inputs=[x]),
    ], ids=["retain_grad", "register_hook", "grad", "grad of several"])
    def test_are_refused(self, wait: Callable) -> None:
        loss, logits = lazy()(tokens())
        with pytest.raises(OutputContractError, match=r"does not pass\s+through them"):
            wait(loss, logits)

    def test_are_refused_after_a_read_as_well(self) -> None:
        loss, logits = lazy()(tokens())
        with pytest.raises(OutputContractError, match="does not pass"):
            torch.autograd.grad(loss + logits.sum(), logits)
        with pytest.raises(OutputContractError, match="does not pass"):
            logits.retain_grad()

    def test_of_a_function_of_a_copy_they_arrive(self) -> None:
        copies = [m(tokens())[1][:] for m in (lazy(), Model())]
        got, want = (torch.autograd.grad((x.view(-1, VOCABULARY) ** 3).sum(), x)[0] for x in copies)
        assert torch.equal(got, want)


class Doubled(torch.autograd.Function):
    """Doubles its input where it lies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        x.mul_(2)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * 2


class TestAutogradFunctions:
    def test_one_that_takes_it(self) -> None:
        model, eager = lazy(), Model()
        got, want = (gradients(m, Cube.apply(m(tokens())[1])) for m in (model, eager))
        assert all(map(torch.equal, got, want))

    def test_one_that_gives_it_on(self, records: list[GraphRecord]) -> None:
        model, eager = lazy(), Model()
        PassOn.passed = 0
        loss, logits = PassOn.apply(*model(tokens()))
        assert type(logits) is LazyTensor
        assert reads(records) == (0, 0)
        real = eager(tokens())[1]
        assert all(map(torch.equal, gradients(model, logits.square().sum()), gradients(eager, real.square().sum())))
        assert PassOn.passed == 1
        loss, logits = PassOn.apply(*model(tokens()))
        assert all(map(torch.equal, gradients(model, loss), gradients(eager, eager(tokens())[0])))

    @pytest.mark.parametrize("read_before", [False, True])
    def test_one_that_writes_to_it(self, read_before: bool) -> None:
        """Its backward is on the gradient's way: fused losses of other libraries write to the logits that they are given."""
        found = []
        for model in (lazy(), Model()):
            logits = model(tokens())[1]
            best = logits.argmax(-1) if read_before else None
            before = logits.clone()
            doubled = Doubled.apply(logits)
            assert doubled is logits
            found.append([doubled.detach(), before.detach(), *gradients(model, doubled.square().sum())])
            assert best is None or torch.equal(doubled.argmax(-1), best)
        assert all(map(torch.equal, *found))

    def test_a_second_derivative_through_one_is_refused(self) -> None:
        model = lazy()
        loss = Cube.apply(model(tokens())[1])
        with pytest.raises(DoubleBackwardError, match="read them first"):
            torch.autograd.grad(loss, list(model.parameters()), create_graph=True)

    def test_its_backward_after_an_optimizer_step_is_refused(self) -> None:
        model = lazy()
        loss = Cube.apply(model(tokens())[1])
        with torch.no_grad():
            model.lm_head.weight.mul_(2)
        with pytest.raises(OutputContractError, match="changed"):
            loss.backward()

    def test_the_second_derivative_of_what_was_read(self) -> None:
        def curvature(model: Model) -> list[Tensor]:
            first = torch.autograd.grad(model(tokens())[1].square().sum(), [model.lm_head.weight], create_graph=True)
            return gradients(model, first[0].square().sum())

        assert all(map(torch.equal, curvature(lazy()), curvature(Model())))


class TestUnderDynamo:
    """Whoever compiles code around the model meets a tensor that Dynamo does not trace, and runs it as eager does."""

    @pytest.mark.parametrize("backend", ["eager", "aot_eager", GivesLogitsUp("always")], ids=["eager", "aot_eager", "fxfuse"])
    def test_a_compiled_loss(self, backend: Any) -> None:
        def use(logits: Tensor) -> Tensor:
            return logits.float().softmax(-1).square().sum() * logits.shape[-1]

        model, eager = lazy(), Model()
        compiled = torch.compile(use, backend=backend, dynamic=True)
        got, want = gradients(model, compiled(model(tokens())[1])), gradients(eager, use(eager(tokens())[1]))
        assert all(map(torch.allclose, got, want))

    def test_a_graph_break_behind_the_head(self) -> None:
        class Broken(Model):
            def head(self, hidden: Tensor, labels: Tensor) -> Any:
                loss, logits = super().head(hidden, labels)
                torch._dynamo.graph_break()
                scaled = loss * 2
                return {"loss": scaled, "logits": logits, "best": logits.argmax(-1), "wide": logits.shape[-1]}

        eager, model = Broken(), Broken()
        compiled = torch.compile(model.head, backend=GivesLogitsUp(), dynamic=True)
        for _ in range(2):
            out = compiled(model.states(tokens()), tokens())
            want = eager(tokens())
            assert type(out["logits"]) is LazyTensor
            assert torch.equal(out["best"], want["best"])
            assert torch.equal(out["loss"], want["loss"])
            assert out["wide"] == VOCABULARY
