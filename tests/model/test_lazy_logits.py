"""Logits of a fused loss: a tensor like eager's in all that can be asked of it, computed when its values are read.

The backend here (giving_up.py) runs graphs as they are and gives the logits up, so values and gradients are eager's, bit for bit.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfuse.errors import DoubleBackwardError, OutputContractError
from fxfuse.output_contract import source, tensor
from fxfuse.output_contract import stamp as stamps
from fxfuse.output_contract.tensor import LazyTensor
from fxfuse.reporting.records import GraphRecord
from tests.model import giving_up
from tests.model.builders import VOCABULARY
from tests.model.giving_up import GivesLogitsUp

WIDTH = 8


class Token:
    """Lives as long as the autograd node that it hooks."""

    def __call__(self, gradient: Tensor) -> None:
        pass


class Model(nn.Module):
    """Embedding, one layer, projection, loss."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.to(dtype)
        self.hidden: list[weakref.ref[Tensor]] = []
        self.history: list[weakref.ref[Token]] = []  # of what lies in the autograd graph behind the hidden states

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.states(tokens), tokens)

    def states(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(self.embed(tokens)))
        token = Token()
        if hidden.requires_grad:
            hidden.register_hook(token)
        self.hidden.append(weakref.ref(hidden))
        self.history.append(weakref.ref(token))
        return hidden

    def head(self, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.lm_head(hidden)
        return F.cross_entropy(logits.view(-1, VOCABULARY).float(), tokens.view(-1)), logits


def lazy(mode: str = "lazy", dtype: torch.dtype = torch.float32) -> Model:
    """A model whose head is a graph that gives its logits up."""
    model = Model(dtype)
    compiled = torch.compile(model.head, backend=GivesLogitsUp(mode), dynamic=True)
    model.forward = lambda tokens: compiled(model.states(tokens), tokens)  # type: ignore[method-assign]
    return model


def tokens(length: int = 5) -> Tensor:
    return torch.randint(0, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(length))


@pytest.fixture(autouse=True)
def records(monkeypatch: pytest.MonkeyPatch) -> list[GraphRecord]:
    made: list[GraphRecord] = []
    make = giving_up.new_record
    monkeypatch.setattr(giving_up, "new_record", lambda: made.append(make()) or made[-1])  # type: ignore[func-returns-value]
    return made


def reads(records: list[GraphRecord]) -> tuple[int, int]:
    """How often the outputs of all graphs were read, and computed."""
    found = [each for record in records for each in record.reads]
    return sum(each.read for each in found), sum(each.materialised for each in found)


def gradients(model: Model, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


QUERIES: dict[str, Callable[[Tensor], Any]] = {
    "shape": lambda x: x.shape,
    "last size": lambda x: x.shape[-1],
    "size": lambda x: x.size(),
    "size of a dim": lambda x: x.size(-1),
    "dtype": lambda x: x.dtype,
    "device": lambda x: x.device,
    "requires_grad": lambda x: x.requires_grad,
    "has a grad_fn": lambda x: x.grad_fn is not None,
    "is_leaf": lambda x: x.is_leaf,
    "is no view": lambda x: x._base is None,
    "dim": lambda x: (x.dim(), x.ndim, x.ndimension()),
    "numel": lambda x: (x.numel(), x.nelement(), torch.numel(x)),
    "len": len,
    "stride": lambda x: (x.stride(), x.stride(0), x.is_contiguous(), x.storage_offset()),
    "floating": lambda x: (x.is_floating_point(), torch.is_floating_point(x), x.is_complex(), x.is_signed()),
    "bytes": lambda x: (x.element_size(), x.itemsize, x.nbytes),
    "place": lambda x: (x.is_cuda, x.is_cpu, x.layout, x.is_sparse, x.is_quantized, x.get_device()),
    "type": lambda x: (isinstance(x, Tensor), torch.is_tensor(x), x.type()),
}


def test_a_question_about_the_tensor_reads_nothing(records: list[GraphRecord]) -> None:
    model, eager = lazy(), Model()
    for length in (7, 5, 9):
        logits, real = model(tokens(length))[1], eager(tokens(length))[1]
        assert type(logits) is LazyTensor
        assert [name for name, ask in QUERIES.items() if ask(logits) != ask(real)] == []
    assert reads(records) == (0, 0)


STAYS_LAZY: dict[str, Callable[[Tensor], Tensor]] = {
    "float": lambda x: x.float(),
    "bfloat16": lambda x: x.bfloat16(),
    "to a dtype": lambda x: x.to(torch.float64),
    "to a dtype, named": lambda x: x.to(dtype=torch.float16, non_blocking=True),
    "to a place and dtype": lambda x: x.to("cpu", torch.float64),
    "to another": lambda x: x.to(torch.zeros((), dtype=torch.bfloat16)),
    "type": lambda x: x.type(torch.float64),
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data,
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.contiguous(),
    "several": lambda x: x.detach().clone().double().to(torch.bfloat16).float(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_casts_and_copies_read_nothing(dtype: torch.dtype, records: list[GraphRecord]) -> None:
    model, eager = lazy(dtype=dtype), Model(dtype)
    for name, change in STAYS_LAZY.items():
        before = reads(records)
        ours, theirs = change(model(tokens())[1]), change(eager(tokens())[1])
        assert type(ours) is LazyTensor, name
        assert (ours.dtype, ours.shape, ours.requires_grad) == (theirs.dtype, theirs.shape, theirs.requires_grad), name
        assert reads(records) == before, name
        assert torch.equal(ours, theirs), name
        assert reads(records)[1] == before[1] + 1, name
        if theirs.requires_grad:
            got, want = (gradients(m, x.double().square().sum()) for m, x in ((model, ours), (eager, theirs)))
            assert all(map(torch.equal, got, want)), name


def test_what_only_looks_like_a_cast_reads() -> None:
    model = lazy()
    for call in (lambda x: x.to(torch.float64, copy=True), lambda x: x.to("meta"), lambda x: x.cpu() * 1):
        assert type(call(model(tokens())[1])) is Tensor


def saved(x: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file)


READERS: dict[str, Callable[[Tensor], Any]] = {
    "argmax": lambda x: x.argmax(-1),
    "softmax": lambda x: x.softmax(-1),
    "function": lambda x: F.log_softmax(x, -1),
    "comparison": lambda x: x == x,
    "comparison with a number": lambda x: x > 0.1,
    "arithmetic": lambda x: 2 * x - x / 3,
    "with another": lambda x: torch.ones(VOCABULARY) * x,
    "print": repr,
    "format": lambda x: f"{x}",
    "format of a number": lambda x: f"{x.sum():.3f}",
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.detach().numpy().tolist(),
    "array": lambda x: __import__("numpy").asarray(x.detach()).tolist(),
    "list": lambda x: x.tolist(),
    "indexing": lambda x: x[0, 1],
    "slicing": lambda x: x[..., :-1, :].contiguous(),
    "iteration": list,
    "unpacking": lambda x: x.unbind(1),
    "view": lambda x: x.view(-1, VOCABULARY),
    "concatenation": lambda x: torch.cat([x, x]),
    "stack of mixed": lambda x: torch.stack([x, torch.zeros_like(x)]),
    "einsum": lambda x: torch.einsum("btv,btv->bt", x, x),
    "loss": lambda x: F.cross_entropy(x.view(-1, VOCABULARY), tokens().view(-1)),
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x.detach() < 100).all()),
    "save": saved,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "copy": copy.copy,
    "deepcopy": lambda x: copy.deepcopy(x.detach()),
    "in place": lambda x: x.mul_(2),
    "assignment": lambda x: x.__setitem__(0, 1.0) or x.clone(),  # type: ignore[func-returns-value]
    "transpose": lambda x: x.mT,
    "gather": lambda x: x.gather(-1, tokens()[..., None]),
    "dlpack": lambda x: torch.from_dlpack(x.detach()),
    "out": lambda x: torch.exp(x.detach(), out=torch.empty(0)),
}


def test_what_reads_it_gets_what_eager_gets(records: list[GraphRecord]) -> None:
    model, eager = lazy(), Model()
    for name, use in READERS.items():
        before = reads(records)
        ours, theirs = use(model(tokens())[1]), use(eager(tokens())[1])
        after = reads(records)
        assert after[0] > before[0], name
        assert after[1] == before[1] + 1, name
        for a, b in zip(*(x if isinstance(x, (list, tuple)) else [x] for x in (ours, theirs)), strict=True):
            if isinstance(b, Tensor):
                assert torch.equal(a, b), name
                assert a.requires_grad == b.requires_grad, name
            else:
                assert str(a) == str(b), name


def test_deepcopy_is_refused_as_in_eager() -> None:
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(lazy()(tokens())[1])


def test_gradients_of_what_was_read_are_eagers() -> None:
    model, eager = lazy(), Model()
    for use in (lambda x: x.square().mean(), lambda x: x.float().logsumexp(-1).sum(), lambda x: (x.softmax(-1) * x).sum()):
        got, want = (gradients(m, use(m(tokens())[1])) for m in (model, eager))
        assert all(map(torch.equal, got, want))


def test_gradients_of_the_loss_and_of_what_was_read_add_up() -> None:
    model, eager, wide = lazy(), Model(), Model(torch.float64)
    got, want, truth = (gradients(m, sum(x.square().mean() if x.dim() else x for x in m(tokens()))) for m in (model, eager, wide))
    for a, b, t in zip(got, want, truth, strict=True):
        assert (a - t).norm() <= 1.5 * max(float((b - t).norm()), float(1e-7 * t.norm()))


def test_backward_of_the_loss_then_a_read_then_another_forward() -> None:
    model, eager = lazy(), Model()
    for length in (4, 6, 4):
        loss, logits = model(tokens(length))
        want, real = eager(tokens(length))
        for m, value in ((model, loss), (eager, want)):
            m.zero_grad()
            value.backward()
        assert torch.equal(logits.argmax(-1), real.argmax(-1))
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), eager.parameters(), strict=True))


def test_it_is_computed_once_however_often_it_is_read(records: list[GraphRecord]) -> None:
    logits = lazy()(tokens())[1]
    assert torch.equal(logits.argmax(-1), logits.softmax(-1).argmax(-1))
    assert torch.equal(logits.detach(), logits.float())
    assert reads(records)[1] == 1
    assert str(records[0].reads[0]).startswith("logits of lm_head: lazy, read 4 times (materialised: 1, first by test_lazy_logits.py:")


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


class Cube(torch.autograd.Function):
    """Sees the lazy tensor itself: autograd functions are below ``__torch_function__``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x**3).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * 3 * ctx.saved_tensors[0] ** 2


class PassOn(torch.autograd.Function):
    """Gives copies on, as DistributedDataParallel's sink does, and counts the gradients that come back."""

    passed = 0

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.clone() for x in inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        PassOn.passed += 1
        return gradients


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


def complaints() -> list[str]:
    """What the contract promises and does not hold."""
    found = []
    model, eager = lazy(), Model()
    loss, logits = model(tokens())
    want = eager(tokens())[1]
    got = [p.grad for p in backwards(model, logits.square().sum())]
    if not all(a is not None and torch.equal(a, b.grad) for a, b in zip(got, backwards(eager, want.square().sum()), strict=True)):
        found.append("gradient")
    if not all(map(torch.equal, gradients(model, Cube.apply(model(tokens())[1])), gradients(eager, Cube.apply(eager(tokens())[1])))):
        found.append("gradient through a function")
    model.hidden.clear()
    model.history.clear()
    kept = [model(tokens())[1] for _ in range(2)]
    gc.collect()
    if model.hidden[0]() is not None:
        found.append("held")
    if model.history[0]() is not None:
        found.append("history held")
    try:
        with torch.no_grad():
            model.lm_head.weight.mul_(2)
        kept[1].sum()
        found.append("stale")
    except OutputContractError:
        pass
    loss, logits = model(tokens())
    backwards(model, loss)
    torch.optim.AdamW(model.parameters(), 0.1, fused=True).step()
    try:
        logits.sum()
        found.append("stale after a fused step")
    except OutputContractError:
        pass
    return found


def backwards(model: Model, loss: Tensor) -> list[nn.Parameter]:
    model.zero_grad()
    loss.backward()
    return list(model.parameters())


def detached_weights(self: Any) -> tuple:
    return tuple(v.detach() if isinstance(v, nn.Parameter) else v for v in ORIGINAL_INPUTS(self))


def close_on_forward_alone(self: Any, reason: str) -> None:
    if reason == source.NEXT_FORWARD:
        ORIGINAL_CLOSE(self, reason)


ORIGINAL_CLOSE = source.Source.close
ORIGINAL_INPUTS = source.Source.inputs

FORWARD = giving_up.FilledOutputs.__call__.__globals__
FAULTS: dict[str, tuple[str, list[tuple[Any, str, Any]]]] = {
    "weights are not looked at": ("stale", [(source, "stamp", lambda value: None)]),
    "only versions are looked at, and no optimizer": (
        "stale after a fused step",
        [(stamps, "sample_of", lambda value: torch.empty(0)), (source.Source, "close", close_on_forward_alone)],
    ),
    "the former forward is not let go": ("held", [(FORWARD, "next_forward", lambda owner: None)]),
    "autograd history stays": ("history held", [(LazyTensor, "forget", lambda self: None)]),
    "the weight is detached": ("gradient", [(source.Source, "inputs", detached_weights)]),
    "functions get no gradient": ("gradient through a function", [(tensor, "differentiable", lambda values: [])]),
}


def test_the_contract_holds() -> None:
    assert complaints() == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, patches = FAULTS[fault]
    for where, name, value in patches:
        monkeypatch.setitem(where, name, value) if isinstance(where, dict) else monkeypatch.setattr(where, name, value)
    try:
        found = complaints()
    except RuntimeError as error:  # "does not require grad"
        found = [f"gradient through a function: {error}", "gradient"]
    assert any(each.startswith(seen) for each in found)
