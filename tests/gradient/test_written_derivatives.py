"""Autograd functions with a hand-written backward: fused where it is the derivative of the forward, kept where it is anything else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxfuse import validation
from fxfuse.backend import Backend
from fxfuse.validation import LIMITS, error_ratio

SLOPE, CUBIC = 0.79788456, 0.044715


def _gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.tanh(SLOPE * x * (1 + CUBIC * x * x)))


def _gelu_slope(x: Tensor, cubic: float = 0.1070322243) -> Tensor:
    bent = torch.tanh(SLOPE * x * (1 + CUBIC * x * x))
    return 0.5 * x * ((1 - bent * bent) * (SLOPE + cubic * x * x)) + 0.5 * (1 + bent)


class Gelu(torch.autograd.Function):
    """Constants to nine digits, as they are written in the wild."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return _gelu(x)

    @staticmethod
    def backward(ctx, g):
        return _gelu_slope(*ctx.saved_tensors) * g


class Swish(torch.autograd.Function):
    """Saves what the forward computed, not what it read; its second operand is a number."""

    @staticmethod
    def forward(ctx, x, beta):
        gate = torch.sigmoid(beta * x)
        ctx.save_for_backward(x, gate)
        ctx.beta = beta
        return x * gate

    @staticmethod
    def backward(ctx, g):
        x, gate = ctx.saved_tensors
        return g * gate * (1 + ctx.beta * x * (1 - gate)), None


class Gate(torch.autograd.Function):
    """Two operands, and float32 inside."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return (torch.nn.functional.silu(x.float()) * y.float()).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        x, y = (t.float() for t in ctx.saved_tensors)
        gate = torch.sigmoid(x)
        slope = gate * (1 + x * (1 - gate))
        return (g.float() * y * slope).to(g.dtype), (g.float() * x * gate).to(g.dtype)


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.clamp(x * 2, -1, 1) * 0.5

    @staticmethod
    def backward(ctx, g):
        return g


class Surrogate(torch.autograd.Function):
    """A step with a smooth slope."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.where(x > 0, torch.ones_like(x), 0.0) * 1.0

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g / (1 + x * x)


class ErfSlope(Gelu):
    """The tanh gelu with the slope of the exact one: three digits agree."""

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (0.5 * (1 + torch.erf(x * 0.70710678)) + 0.3989423 * x * torch.exp(-0.5 * x * x))


class OtherCubic(Gelu):
    """The slope with its last constant wrong in the fifth digit."""

    @staticmethod
    def backward(ctx, g):
        return _gelu_slope(*ctx.saved_tensors, cubic=0.10703) * g


class Clipped(Gelu):
    """The slope, clipped where only a few samples fall."""

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.where(x.abs() < 15.0, _gelu_slope(x), 0.0) * g


class OtherAtZero(torch.autograd.Function):
    """relu, with the slope 1 at 0 where torch's has 0."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.relu(x) * 2.0

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.where(x >= 0, g, 0.0) * 2.0


class Summed(torch.autograd.Function):
    """The backward of a broadcast: no row program of one element each, and not looked at further."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.tanh(x) * 2.0

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * 2.0 * (1 - torch.tanh(x).square()) + 0.0 * x.sum(-1, keepdim=True)


class Block(torch.nn.Module):
    def __init__(self, function, *more, operands=1):
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.more = more
        self.inward = torch.nn.ModuleList(torch.nn.Linear(24, 32) for _ in range(operands))
        self.outward = torch.nn.Linear(32, 24)

    def forward(self, x):
        return self.outward(self.function.apply(*(linear(x) for linear in self.inward), *self.more))


def step(call, model, x):
    """The output and the gradients of the input and of every weight."""
    leaf = x.detach().clone().requires_grad_()
    out = call(leaf)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), [leaf, *model.parameters()])]


def compiled(model, **options):
    torch._dynamo.reset()
    return torch.compile(model, backend=Backend(remainder="eager", strict=True, **options), dynamic=True)



def found_sites(records):
    """Of the graph that runs: where numbers are inputs, Dynamo traces twice."""
    return records[-1].sites


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    validation.forget_verdicts()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("function", "more", "operands"), [(Gelu, (), 1), (Swish, (1.702,), 1), (Gate, (), 2)])
def test_a_written_derivative_is_fused(function, more, operands, dtype, records):
    model = Block(function, *more, operands=operands).to(dtype)
    exact = Block(function if function is not Gate else _GateInFloat64, *more, operands=operands).double()
    exact.load_state_dict({name: tensor.double() for name, tensor in model.state_dict().items()})
    ours = compiled(model)
    x = torch.randn(5, 7, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    found, eager, truth = step(ours, model, x), step(model, model, x), step(exact, exact, x.double())
    fused = [site.rule for site in found_sites(records) if site.status == "fused"]
    assert {"Gelu": "activation", "Swish": "activation", "Gate": "gated_activation"}[function.__name__] in fused
    assert not [site for site in found_sites(records) if "autograd.Function" in site.reason]
    for a, b, t in zip(found, eager, truth, strict=True):
        assert error_ratio(a, b, t) <= LIMITS[dtype]


class _GateInFloat64(Gate):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return torch.nn.functional.silu(x) * y

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        gate = torch.sigmoid(x)
        return g * y * gate * (1 + x * (1 - gate)), g * x * gate


@pytest.mark.parametrize(("function", "why"), [
    (StraightThrough, "is not the derivative"), (Surrogate, "not known here"), (ErfSlope, "is not the derivative"),
    (OtherCubic, "is not the derivative"), (Clipped, "is not the derivative"), (OtherAtZero, "is not the derivative"),
    (Summed, "more than pointwise"),
])  # fmt: skip
def test_any_other_backward_is_kept(function, why, records):
    model = Block(function).bfloat16()
    ours = compiled(model)
    x = torch.randn(5, 7, 24, generator=torch.Generator().manual_seed(1)).bfloat16()
    found, eager = step(ours, model, x), step(model, model, x)
    (declined,) = [site for site in found_sites(records) if "autograd.Function" in site.reason]
    assert declined.status == "declined"
    assert why in declined.reason
    for a, b in zip(found, eager, strict=True):
        assert torch.equal(a, b)


def test_constants_of_nine_digits_are_not_the_derivative_in_float64(records):
    model = Block(Gelu).double()
    ours = compiled(model)
    x = torch.randn(3, 24, dtype=torch.float64)
    found, eager = step(ours, model, x), step(model, model, x)
    assert any("autograd.Function" in site.reason for site in found_sites(records))
    assert all(torch.equal(a, b) for a, b in zip(found, eager, strict=True))


@pytest.mark.parametrize(("function", "status"), [(Gelu, "fused"), (ErfSlope, "declined")])
def test_without_validation_a_derivative_is_recognised_all_the_same(function, status, records):
    model = Block(function)
    ours = compiled(model, validate="off")
    step(ours, model, torch.randn(3, 24))
    (site,) = found_sites(records)
    assert site.status == status


def test_a_number_that_changes_is_read_again():
    model = Block(Swish, 1.0)
    ours = compiled(model)
    x = torch.randn(3, 24)
    for beta in (1.0, 1.702, 0.5):
        model.more = (beta,)
        exact = Block(Swish, beta).double()
        for a, b, t in zip(step(ours, model, x), step(model, model, x), step(exact, exact, x.double()), strict=True):
            assert error_ratio(a, b, t) <= LIMITS[torch.float32]
