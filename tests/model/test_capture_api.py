"""The doors: arguments, refusals, what is left alone and said so, and that everything can be taken back."""

from __future__ import annotations

import contextlib
import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.capture import current_module, find_installation, install
from fxfuse.capture import dispatcher as dispatching
from tests.model import builders as build
from tests.model.builders import CAPTURED, Graphs, PassThrough, differences, step, tokens


@pytest.fixture(autouse=True)
def nothing_captured() -> None:
    CAPTURED.clear()


@pytest.fixture
def pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """fxfuse.optimize with graphs run unchanged: these tests are about capture."""
    monkeypatch.setattr("fxfuse.api._backend", lambda *options: PassThrough())


def graphs() -> Graphs:
    return CAPTURED.get("", Graphs())


def notes(model: nn.Module) -> str:
    return "\n".join(fxfuse.report(model).notes)


@pytest.mark.usefixtures("pass_through")
class TestInPlace:
    def test_the_same_object_comes_back(self):
        model = build.NanoGPT()
        assert fxfuse.optimize(model) is model

    def test_twice_is_once(self):
        model = fxfuse.optimize(build.llama())
        slots = [module._compiled_call_impl for module in model.modules()]
        fxfuse.optimize(model)
        assert all(a is b._compiled_call_impl for a, b in zip(slots, model.modules(), strict=True))

    def test_a_part_and_then_the_whole(self):
        model = build.llama()
        want = step(model, tokens())
        fxfuse.optimize(model.model)
        fxfuse.optimize(model)
        assert differences(step(model, tokens()), want) == []
        assert graphs().calling("cross_entropy") == 1

    @pytest.mark.parametrize("make", [build.llama, build.NanoGPT])
    def test_restore_is_exact(self, make: Any):
        model, fresh = make(), make()
        fxfuse.restore(fxfuse.optimize(model, example_inputs=tokens()))
        for (name, ours), (_, theirs) in zip(model.named_modules(), fresh.named_modules(), strict=True):
            assert set(vars(ours)) == set(vars(theirs)), name
        assert "not optimized" in notes(model)

    def test_example_inputs_leave_no_trace_but_graphs(self):
        class Counting(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = build.NanoGPT(dropout=0.5)
                self.norm = nn.BatchNorm1d(build.VOCABULARY)
                self.register_buffer("calls", torch.zeros(()))

            def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
                self.calls += 1
                return self.norm(self.body(input_ids)["logits"].flatten(0, 1)).mean()

        model = Counting()
        model.body.lm_head.weight.grad = torch.ones_like(model.body.lm_head.weight)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        random = torch.get_rng_state()
        fxfuse.optimize(model, example_inputs=(tokens()["input_ids"],))
        assert len(graphs()) > 0
        assert torch.equal(torch.get_rng_state(), random)
        assert differences(before, dict(model.state_dict())) == []
        assert torch.equal(model.body.lm_head.weight.grad, torch.ones_like(model.body.lm_head.weight))
        assert all(p.grad is None for p in model.parameters() if p is not model.body.lm_head.weight)

    def test_disabled_by_the_environment(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("FXFUSE_DISABLE", "1")
        model = fxfuse.optimize(build.NanoGPT(), example_inputs=tokens())
        assert find_installation(model) is None
        assert graphs() == []
        assert "FXFUSE_DISABLE" in notes(model)

    def test_the_report_tells_a_copy_and_what_is_pending(self):
        model = fxfuse.optimize(build.NanoGPT())
        assert "Pending" in notes(model)
        assert "copy of an optimized model" in notes(copy.deepcopy(model))

    def test_no_python_warning_escapes(self, recwarn: pytest.WarningsRecorder):
        model = fxfuse.optimize(build.NanoGPT())
        step(model, tokens())
        assert [str(warning.message) for warning in recwarn] == []


class TestArguments:
    @pytest.mark.parametrize("model", [None, "gpt2", lambda x: x])
    def test_no_module(self, model: Any):
        with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
            fxfuse.optimize(model)

    @pytest.mark.parametrize(
        ("arguments", "error", "words"),
        [
            (dict(validate="quick"), ValueError, "'fast', 'full', 'off'"),
            (dict(remainder="xla"), ValueError, "'auto', 'eager', 'inductor'"),
            (dict(logits="none"), ValueError, "'lazy'"),
            (dict(rules="rms_norm"), TypeError, "tuple of rule names"),
            (dict(exclude=("rmsnorm",)), ValueError, "'rmsnorm'.*rms_norm"),
            (dict(strict="yes"), TypeError, "True or False"),
            (dict(memory=[1]), TypeError, "22GiB"),
            (dict(example_inputs="text"), TypeError, "dict of keyword arguments"),
        ],
        ids=lambda value: str(value) if isinstance(value, dict) else "",
    )
    def test_wrong_values_say_what_is_accepted(self, arguments: dict, error: type, words: str):
        with pytest.raises(error, match=words):
            fxfuse.optimize(build.NanoGPT(), **arguments)

    def test_already_compiled_or_wrapped(self):
        with pytest.raises(ValueError, match=r"give fxfuse\.optimize the model itself"):
            fxfuse.optimize(torch.compile(build.NanoGPT(), backend="eager"))
        with pytest.raises(ValueError, match=r"call fxfuse\.optimize.* first, then wrap it"):
            fxfuse.optimize(nn.DataParallel(build.NanoGPT()))


class TestLeftAlone:
    """Each is declined with a sentence, trains as in eager, and takes nothing else down with it."""

    def check(self, model: nn.Module, words: str) -> None:
        want = step(model, tokens())
        install(model, PassThrough())
        assert words in notes(model)
        assert differences(step(model, tokens()), want) == []

    def test_a_block_compiled_by_somebody_else(self):
        model = build.NanoGPT()
        model.transformer.h[0].compile(backend="eager")
        theirs = model.transformer.h[0]._compiled_call_impl
        self.check(model, "already compiled")
        fxfuse.restore(model)
        assert model.transformer.h[0]._compiled_call_impl is theirs

    def test_a_forward_replaced_on_the_instance(self):
        model = build.NanoGPT()
        block = model.transformer.h[1]
        block.forward = lambda x, forward=block.forward: forward(x) * 0.5
        self.check(model, "replaced on the instance")

    def test_kernels_of_a_library(self):
        model = build.NanoGPT()

        class LigerNorm(nn.LayerNorm):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return super().forward(x)

        LigerNorm.forward.__module__ = "liger_kernel.transformers"
        model.transformer.h[0].norm_1 = LigerNorm(build.HIDDEN)
        self.check(model, "liger_kernel")

    def test_kernels_of_the_hub(self):
        model = build.NanoGPT()
        model.use_kernels = True
        self.check(model, "use_kernels=False")
        assert graphs() == []

    def test_meta_parameters(self):
        with torch.device("meta"):
            model = build.NanoGPT()
        install(model, PassThrough())
        assert "meta device" in notes(model)

    def test_a_tensor_subclass(self):
        from torch.testing._internal.two_tensor import TwoTensor

        model = build.NanoGPT()
        linear = model.transformer.h[0].mlp[0]
        linear.weight = nn.Parameter(TwoTensor(linear.weight.detach(), linear.weight.detach()))
        install(model, PassThrough())
        assert "TwoTensor" in notes(model)


class Choosy(nn.Module):
    """A block that Dynamo cannot capture: it looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(build.HIDDEN), build.Block(build.HIDDEN, 4)
        self.tried = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.norm(x)) if float(x.detach().sum()) > -1e30 else x


def test_a_block_that_breaks_stays_eager_and_its_parts_are_captured(caplog: pytest.LogCaptureFixture):
    torch.manual_seed(0)
    model = build.NanoGPT(layers=3)
    model.transformer.h = nn.ModuleList([Choosy() for _ in range(3)])
    want = step(model, tokens())
    install(model, PassThrough())
    with caplog.at_level(logging.WARNING, "fxfuse"):
        assert differences(step(model, tokens()), want) == []
    assert (
        len([record for record in caplog.records if "Choosy (3 modules) stays eager" in record.message]) == 1
    )
    assert "Choosy (3 modules) stays eager and its parts are captured instead" in notes(model)
    assert graphs().calling("scaled_dot_product_attention") == 1
    assert graphs().calling("cross_entropy") == 1
    made = len(graphs())
    assert differences(step(model, tokens()), want) == []
    assert len(graphs()) == made


class Moody(build.Block):
    """A block whose graph depends on a word."""

    def forward(self, x: torch.Tensor, mood: str = "calm") -> torch.Tensor:
        return super().forward(x) * (1 + len(mood) / 100)


def test_the_recompile_limit_is_an_error_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dispatching, "RECOMPILE_LIMIT", 3)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Moody(build.HIDDEN, 4) for _ in range(2)])

        def forward(self, x: torch.Tensor, mood: str) -> torch.Tensor:
            for block in self.blocks:
                x = block(x, mood)
            return x

    model = Model()
    batches = [{"x": torch.randn(2, 5, build.HIDDEN), "mood": "!" * n} for n in range(6)]
    want = [step(model, batch) for batch in batches]
    install(model, PassThrough())
    with contextlib.ExitStack() as limited:
        if not dispatching.LIMIT_IS_ARGUMENT:  # then install has just set it for the process
            limited.enter_context(torch._dynamo.config.patch(recompile_limit=3))
        assert all(differences(step(model, batch), w) == [] for batch, w in zip(batches, want, strict=True))
    errors = fxfuse.report(model).errors
    assert any("Moody" in error and "recompile limit" in error for error in errors)


def test_current_module_is_the_one_that_runs():
    seen: list[str] = []

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x)

    def watch(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        def run(*args: Any) -> Any:
            seen.append(type(current_module()).__name__)
            return gm.forward(*args)

        seen.append("compiling " + type(current_module()).__name__)
        return run

    model = Watching()
    install(model, watch)
    model(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert seen == ["compiling Watching", "Watching"]
    assert current_module() is None


def test_the_real_backend_end_to_end():
    model = build.llama()
    want = step(model, tokens())
    fxfuse.optimize(model, remainder="eager")
    got = step(model, tokens())
    assert set(got) == set(want)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6)
    report = fxfuse.report(model)
    assert len(report.graphs) == 3
    assert sum(site.launches for site in report.sites if site.status == "fused") > 0
    fxfuse.restore(model)
    assert differences(step(model, tokens()), want) == []
