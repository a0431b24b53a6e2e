"""The backend door: ``torch.compile(module, backend="fxfuse")`` trains as eager does, keeps its promises, names its errors."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from fxfuse import aot, backend, lowering, reference, rewriting
from fxfuse.backend import Backend, backend_from_options
from fxfuse.capture.context import enter, leave
from fxfuse.errors import DoubleBackwardError, UnsupportedGraph
from fxfuse.reporting.records import GraphRecord, attached
from fxfuse.validation import forget_verdicts


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Block(nn.Module):
    """Norm, gated MLP, residual."""

    def __init__(self, width: int = 16, hidden: int = 48) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def compiled(function: Callable[..., Tensor], **options: object) -> Callable[..., Tensor]:
    return torch.compile(function, backend=Backend(**{"strict": True, "remainder": "eager", **options}), fullgraph=True)


def gradients(function: Callable[..., Tensor], module: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Output and gradients of inputs and parameters."""
    leaves = [*(x for x in inputs if x.requires_grad), *module.parameters()]
    output = function(*inputs)
    return [output.detach(), *torch.autograd.grad(output.float().square().mean(), leaves)]


def assert_as_good_as_eager(ours: list[Tensor], eager: list[Tensor], truth: list[Tensor]) -> None:
    from fxfuse.validation import LIMITS, error_ratio

    for a, b, t in zip(ours, eager, truth, strict=True):
        assert error_ratio(a, b, t) <= LIMITS[a.dtype] * 1.5  # a whole block: several roundings in a row


@pytest.mark.parametrize("remainder", ["eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_block_trains_as_in_eager(remainder: str, dtype: torch.dtype, records: list[GraphRecord]) -> None:
    module, x = Block().to(dtype), torch.randn(2, 33, 16, dtype=dtype, requires_grad=True)
    wide = Block().double()
    wide.load_state_dict(module.state_dict())
    truth = gradients(wide, wide, x.detach().double().requires_grad_())
    ours = gradients(compiled(module, remainder=remainder), module, x)
    assert_as_good_as_eager(ours, gradients(module, module, x), truth)
    assert [site.status for site in records[0].sites].count("fused") >= 2
    assert records[0].calls == 1


def test_found_by_name_with_options(records: list[GraphRecord]) -> None:
    module, x = Block(), torch.randn(2, 3, 16)
    torch.compile(module, backend="fxfuse", options={"remainder": "eager", "exclude": ("gated_activation",)})(x)
    status = {site.rule: site.status for site in records[0].sites}
    assert status["gated_activation"] == "declined"
    assert "fused" in status.values()


@pytest.mark.parametrize(("options", "message"), [
    ({"remaider": "eager"}, "no option 'remaider'; it takes rules, exclude, plan"),
    ({"remainder": "tvm"}, "remainder takes one of 'auto', 'eager', 'inductor', got 'tvm'"),
    ({"validate": True}, "validate takes one of 'fast', 'full', 'off', got True"),
    ({"strict": 1}, "strict takes True or False, got 1"),
    ({"rules": "rms_norm"}, "rules takes a sequence of rule names, got 'rms_norm'"),
], ids=["unknown", "remainder", "validate", "strict", "rules"])
def test_bad_options_say_what_is_accepted(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        backend_from_options(options)


def test_a_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="has no modes, got mode='max-autotune'"):
        backend_from_options({}, mode="max-autotune")


def test_equal_backends_share_a_graph() -> None:
    assert Backend(exclude=("rope",)) == Backend(exclude=("rope",))
    assert hash(Backend()) == hash(Backend())
    first, second = Block(), Block()
    torch.compiler.reset()
    counted = CompileCounterWithBackend("eager")
    assert counted.frame_count == 0
    x = torch.randn(2, 3, 16)
    made: list[GraphRecord] = []
    make = backend.new_record
    backend.new_record = lambda: made.append(make()) or made[-1]  # type: ignore[func-returns-value]
    try:
        for module in (first, second):
            forward = torch.compile(type(module).forward, backend=Backend(remainder="eager"), dynamic=True)
            forward(module, x)
    finally:
        backend.new_record = make
    assert len(made) == 1


def test_retain_graph_and_many_backwards() -> None:
    module, x = Block(), torch.randn(2, 3, 16, requires_grad=True)
    loss = compiled(module)(x).square().sum()
    first, = torch.autograd.grad(loss, x, retain_graph=True)
    again, = torch.autograd.grad(loss, x, retain_graph=True)
    last, = torch.autograd.grad(loss, x)
    assert torch.equal(first, again)
    assert torch.equal(first, last)


@pytest.mark.parametrize("remainder", ["eager", "inductor"])
def test_a_second_derivative_is_a_named_error(remainder: str) -> None:
    module, x = Block(), torch.randn(2, 3, 16, requires_grad=True)
    grad, = torch.autograd.grad(compiled(module, remainder=remainder)(x).square().sum(), x, create_graph=True)
    with pytest.raises(DoubleBackwardError, match="first derivatives only"):
        grad.sum().backward()


@pytest.mark.parametrize("remainder", ["eager", "inductor"])
def test_a_batch_of_gradients_is_a_named_error(remainder: str) -> None:
    module, x = Block(), torch.randn(2, 3, 16, requires_grad=True)
    out = compiled(module, remainder=remainder)(x)
    with pytest.raises(UnsupportedGraph, match=r"one gradient at a time.*fxfuse\.restore"):
        torch.autograd.grad(out, x, torch.stack([torch.ones_like(out), out.detach()]), retain_graph=True, is_grads_batched=True)
    torch.autograd.grad(out.sum(), x)  # which is none


def test_create_graph_alone_is_no_error() -> None:
    module, x = Block(), torch.randn(2, 3, 16, requires_grad=True)
    run = compiled(module)
    created, = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
    plain, = torch.autograd.grad(run(x).square().sum(), x)
    assert torch.equal(created, plain)


def test_one_graph_for_all_lengths(records: list[GraphRecord]) -> None:
    module = Block()
    run = torch.compile(module, backend=Backend(strict=True, remainder="eager"), dynamic=True, fullgraph=True)
    for length in (5, 7, 64, 33):
        x = torch.randn(3, length, 16, requires_grad=True)
        for ours, eager in zip(gradients(run, module, x), gradients(module, module, x), strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-6)
    assert len(records) == 1
    assert records[0].calls == 4


def test_inference_computes_no_statistics(records: list[GraphRecord]) -> None:
    module, x = Block(), torch.randn(2, 3, 16)
    with torch.no_grad():
        ours = compiled(module)(x)
        torch.testing.assert_close(ours, module(x), rtol=1e-5, atol=1e-6)
    assert "s_0" not in records[0].forward_source
    assert records[0].backward_source == ""


def test_frozen_parameters_get_no_gradient_kernels(records: list[GraphRecord]) -> None:
    module, x = Block(), torch.randn(2, 3, 16, requires_grad=True)
    module.requires_grad_(False)
    run = compiled(module)
    ours, = torch.autograd.grad(run(x).square().sum(), x)
    eager, = torch.autograd.grad(module(x).square().sum(), x)
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)
    source = records[0].backward_source
    assert source.count("aten.mm") + source.count("calls_accumulate(") == 3


def test_saved_tensors_are_freed_while_the_backward_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the last kernel of the backward starts, what earlier ones read is gone: gate, up and cotangents of the MLP."""
    module, x = Block(16, 64), torch.randn(2, 64, 16, requires_grad=True)
    alive_at_launch: list[int] = []
    execute = reference.execute

    def watching(program: object, tensors: list[Tensor]) -> list[Tensor]:
        gc.collect()
        alive_at_launch.append(sum(1 for ref in wide if ref() is not None))
        return execute(program, tensors)

    wide: list[weakref.ref] = []

    monkeypatch.setattr(reference, "execute", watching)
    lowering.launcher.cache_clear()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape[-1] == 64 and tensor.dim() == 3:
            wide.append(weakref.ref(tensor))
        return tensor

    run = compiled(module, validate="off")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = run(x).square().sum()
    alive_at_launch.clear()
    loss.backward()
    assert len(wide) == 2, "gate and up are kept, their product is not"
    assert alive_at_launch[0] == 2
    assert alive_at_launch[-1] == 0
    lowering.launcher.cache_clear()


class Mutating(nn.Module):
    """Counts its calls in a buffer and changes an input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        self.seen += 1
        y = self.block(x)
        memory.mul_(0.5).add_(y.detach())
        return y


def test_side_effects_happen_once() -> None:
    module, x = Mutating(), torch.randn(2, 3, 16, requires_grad=True)
    memory, expected_memory = torch.ones(2, 3, 16), torch.ones(2, 3, 16)
    expected = module(x, expected_memory)
    module.seen.zero_()
    ours = compiled(module)(x, memory)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(memory, expected_memory, rtol=1e-5, atol=1e-6)
    assert module.seen == 1


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(checkpoint(self.first, x, use_reentrant=False))


def test_checkpointing_inside_a_graph_is_kept(records: list[GraphRecord]) -> None:
    module, x = Checkpointed(), torch.randn(2, 3, 16, requires_grad=True)
    for ours, eager in zip(gradients(compiled(module), module, x), gradients(module, module, x), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-6)
    assert [site.status for site in records[0].sites].count("fused") >= 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_around_a_graph(reentrant: bool) -> None:
    """The graph is compiled, and its sites are tried, while the checkpoint watches what is saved."""
    module, x = Block(), torch.randn(2, 3, 16, requires_grad=True)
    forget_verdicts()
    checkpoint(compiled(module), x, use_reentrant=reentrant).square().mean().backward()
    ours = [x.grad, *(parameter.grad for parameter in module.parameters())]
    for a, b in zip(ours, gradients(module, module, x)[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


class Clipped(torch.autograd.Function):
    """A gradient of somebody's own."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * torch.tanh(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad.clamp(-1e-3, 1e-3)


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(Clipped.apply(self.block(x)))


def test_a_users_own_autograd_function_keeps_its_gradient(records: list[GraphRecord]) -> None:
    module, x = Custom(), torch.randn(2, 3, 16, requires_grad=True)
    for ours, eager in zip(gradients(compiled(module), module, x), gradients(module, module, x), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-6)
    assert "written by hand" in next(site for site in records[0].sites if site.status == "declined").reason


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast(enabled: bool, records: list[GraphRecord]) -> None:
    module, x = Block(), torch.randn(2, 3, 16, requires_grad=True)
    run = compiled(module)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        ours, eager = gradients(run, module, x), gradients(module, module, x)
    for a, b in zip(ours, eager, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-2 if enabled else 1e-4, atol=2e-3 if enabled else 1e-6)
    assert any(site.status == "fused" for site in records[0].sites)


@pytest.mark.parametrize("stage", ["plan_residuals", "validate", "replace_region"])
def test_an_internal_error_declines_a_site(stage: str, monkeypatch: pytest.MonkeyPatch, records: list[GraphRecord],
                                           caplog: pytest.LogCaptureFixture) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("a bug of ours")

    module, x = Block(), torch.randn(2, 3, 16, requires_grad=True)
    monkeypatch.setattr(rewriting, stage, broken)
    monkeypatch.setattr(rewriting, "_told", set())
    ours = gradients(compiled(module, strict=False), module, x)
    for a, b in zip(ours, gradients(module, module, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    found = [site for site in records[0].sites if site.rule != "shared_input_linears"]  # (those are found after the partition)
    assert found
    assert all("internal error: RuntimeError: a bug of ours" in site.reason for site in found)
    assert "a bug of ours" in caplog.text


def test_an_internal_error_is_raised_when_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(rewriting, "validate", broken)
    with pytest.raises(Exception, match="a bug of ours"):
        compiled(Block())(torch.randn(2, 3, 16))


@pytest.mark.parametrize(("step", "hidden"), [("min_cut_partition", 48), ("_donate_nothing", 1)], ids=["before", "after"])
def test_a_graph_that_cannot_be_planned_runs_its_fused_ops_one_by_one(step: str, hidden: int, monkeypatch: pytest.MonkeyPatch,
                                                                     records: list[GraphRecord]) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no plan")

    monkeypatch.setattr(aot, step, broken)
    module, x = Block(hidden=hidden), torch.randn(2, 3, 16, requires_grad=True)
    ours = gradients(compiled(module, strict=False), module, x)
    for a, b in zip(ours, gradients(module, module, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert "no plan" in records[0].errors[0]
    arranged_after_the_plan = [site for site in records[0].sites if site.rule == "shared_input_linears"]
    assert {(site.status, site.reason) for site in arranged_after_the_plan} == \
        {("declined", "its graph runs without a memory plan")}
    others = [site for site in records[0].sites if site not in arranged_after_the_plan]
    assert others
    assert all(site.status == "fused" for site in others)


def test_a_tensor_subclass_is_left_alone(records: list[GraphRecord]) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    module, x = Block(), TwoTensor(torch.randn(2, 3, 16), torch.randn(2, 3, 16))
    with torch.no_grad():
        ours = compiled(module)(x)
        expected = module(x)
    torch.testing.assert_close(ours.a, expected.a)
    assert "TwoTensor" in records[0].notes[0]


def test_records_hang_on_the_module_that_runs() -> None:
    first, second, x = Block(), Block(), torch.randn(2, 3, 16)
    run = torch.compile(Block.forward, backend=Backend(remainder="eager"), dynamic=True)
    for module, times in ((first, 2), (second, 3)):
        for _ in range(times):
            nothing = lambda: None  # noqa: E731
            enter(SimpleNamespace(module=module, kind=SimpleNamespace(role="block"), over_limit=nothing, before_compiling=nothing))
            try:
                run(module, x)
            finally:
                leave()
    (record, calls), = attached(first).items()
    assert calls == 2
    assert attached(second) == {record: 3}
    assert record.calls == 5


def test_steps_repeat_bit_for_bit() -> None:
    module, x = Block().bfloat16(), torch.randn(2, 33, 16, dtype=torch.bfloat16, requires_grad=True)
    run = compiled(module)
    assert all(torch.equal(a, b) for a, b in zip(gradients(run, module, x), gradients(run, module, x), strict=True))
