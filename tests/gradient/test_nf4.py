"""4-bit linears: values are bitsandbytes' bit for bit, gradients as near to float64 as its own, of the weights as they are now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from fxfuse import quantized_op
from fxfuse.backend import Backend
from fxfuse.quantized_linears import random_weight
from fxfuse.quantized_op import dequantize_4bit
from fxfuse.validation import error_ratio
from tests.model.quantized_models import in_4bit

bnb = pytest.importorskip("bitsandbytes")


class Projection(nn.Module):
    def __init__(self, columns: int = 64, rows: int = 96, bias: bool = False) -> None:
        super().__init__()
        self.proj = nn.Linear(columns, rows, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def fused(module: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(module, backend=Backend(strict=True, remainder="eager", **options), dynamic=True)


def weight_of(module: Projection) -> Tensor:
    """The weight in float64, by bitsandbytes."""
    layer = module.proj
    state = layer.weight.quant_state
    state.dtype, before = layer.compute_dtype, state.dtype
    weight = bnb.functional.dequantize_4bit(layer.weight.data, state).double()
    state.dtype = before
    return weight


def results(module: Callable[..., Tensor], x: Tensor, gradient: Tensor, bias: Tensor | None) -> list[Tensor]:
    y = module(x)
    leaves = [x] if bias is None else [x, bias]
    return [y.detach(), *torch.autograd.grad(y, leaves, gradient)]


def ratios(module: Projection, x: Tensor, **options: Any) -> list[float]:
    """Our error over eager's: of the output, the gradient of x, and that of the bias."""
    bias = module.proj.bias
    module(x.detach())
    if bias is not None:
        bias.requires_grad_()
    gradient = torch.randn(*x.shape[:-1], module.proj.out_features, dtype=x.dtype) * x.detach().abs().mean()
    eager, ours = results(module, x, gradient, bias), results(fused(module, **options), x, gradient, bias)
    assert [t.dtype for t in ours] == [t.dtype for t in eager]
    weight = weight_of(module)
    dtype = module.proj.compute_dtype
    rounded = x.detach().to(dtype).double()
    product = rounded @ weight.T + (0 if bias is None else bias.detach().double())
    exact = [product, gradient.double() @ weight]
    if bias is not None:
        exact.append(gradient.double().sum((0, 1)))
    return [error_ratio(a, b, c) for a, b, c in zip(ours, eager, exact, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, dict(quant_type="fp4", compress_statistics=False), dict(quant_storage=torch.half)], ids=str)
def test_outputs_and_gradients(options: dict[str, Any], dtype: torch.dtype) -> None:
    module = in_4bit(Projection(bias=True), dtype, **options)
    for scale in (1e-3, 1.0, 30.0 if dtype == torch.float16 else 1e3):  # beyond 30, eager overflows in float16
        x = (torch.randn(3, 7, 64) * scale).to(dtype).requires_grad_()
        assert max(ratios(module, x)) <= (1.5 if dtype == torch.float32 else 2.0)


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
def test_values_are_those_of_bitsandbytes(given: torch.dtype) -> None:
    """The input is cast to the compute dtype and the result back, where the layer casts them."""
    module, x = in_4bit(Projection(), torch.bfloat16), torch.randn(3, 7, 64, dtype=given, requires_grad=True)
    ours, eager = fused(module)(x), module(x)
    gradient = torch.randn_like(eager)
    assert ours.dtype == given
    assert torch.equal(ours, eager)
    assert torch.equal(*(torch.autograd.grad(y, x, gradient)[0] for y in (ours, eager)))


# ---- the weights as they are now -----------------------------------------------------------------------------


def test_weights_that_change_after_capture() -> None:
    module, x = in_4bit(Projection(), torch.float32), torch.randn(2, 3, 64, requires_grad=True)
    counter = CompileCounterWithBackend(Backend(strict=True, remainder="eager"))
    run = torch.compile(module, backend=counter, dynamic=True)
    run(x)
    for change in (anew, in_place, scales_only, offset_only):
        before = run(x)
        change(module.proj)
        assert not torch.equal(run(x), before)
        assert torch.equal(run(x), module(x))
        assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (run(x), module(x))))
    assert counter.frame_count == 1


def anew(layer: nn.Module) -> None:
    """Another weight, quantized into another parameter."""
    layer.weight = bnb.nn.Params4bit(torch.randn(96, 64), requires_grad=False, quant_type="nf4", compress_statistics=True).to("cpu")


def in_place(layer: nn.Module) -> None:
    """The same parameter with other bytes."""
    layer.weight.data.bitwise_not_()


def scales_only(layer: nn.Module) -> None:
    layer.weight.quant_state.state2.absmax = layer.weight.quant_state.state2.absmax * 1.5


def offset_only(layer: nn.Module) -> None:
    layer.weight.quant_state.offset = layer.weight.quant_state.offset + 0.25


@pytest.mark.parametrize("nested", [True, False])
def test_layers_of_a_kind_share_a_graph(nested: bool) -> None:
    layers = [in_4bit(Projection(), torch.float32, compress_statistics=nested) for _ in range(12)]
    counter = CompileCounterWithBackend(Backend(strict=True, remainder="eager"))
    for layer in layers:
        x = torch.randn(2, 3, 64, requires_grad=True)
        assert torch.equal(torch.compile(layer, backend=counter, dynamic=True)(x), layer(x))
    assert counter.frame_count == 1


def test_checkpointed_the_gradients_are_the_same() -> None:
    module, x = in_4bit(Projection(), torch.float32), torch.randn(2, 3, 64, requires_grad=True)

    def checkpointed(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)

    ours, eager = fused(checkpointed)(x), module(x)
    assert torch.equal(ours, eager)
    assert torch.equal(*(torch.autograd.grad(y.sin().sum(), x)[0] for y in (ours, eager)))


# ---- the op --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_opcheck_finds_nothing(nested: bool, dtype: torch.dtype) -> None:
    arguments = (*random_weight(torch.device("cpu"), 64, (32, 128), nested), 64, "nf4", [32, 128], dtype)
    torch.library.opcheck(dequantize_4bit, arguments)


@pytest.mark.parametrize(("quant_type", "blocksize"), [("nf4", 64), ("fp4", 64), ("nf4", 32), ("nf4", 1024), ("fp4", 256)])
def test_the_op_is_the_dequantization_of_bitsandbytes(quant_type: str, blocksize: int) -> None:
    packed, state = bnb.functional.quantize_4bit(torch.randn(16, 4096), blocksize=blocksize, quant_type=quant_type,
                                                 compress_statistics=True)  # fmt: skip
    tensors = [packed, state.state2.absmax, state.absmax, state.state2.code, state.offset]
    ours = dequantize_4bit(*tensors, blocksize, quant_type, [16, 4096], torch.float32)
    assert torch.equal(ours, bnb.functional.dequantize_4bit(packed, state))


# ---- planted faults ------------------------------------------------------------------------------------------


def faulty(kind: str) -> Callable[..., Tensor]:
    right = quantized_op.by_bitsandbytes

    def wrong(packed: Tensor, absmax: Tensor, absmax_8bit: Tensor, code: Tensor, offset: Tensor, *rest: Any) -> Tensor:
        if kind == "offset missing":
            return right(packed, absmax, absmax_8bit, code, torch.zeros_like(offset), *rest)
        if kind == "nibbles swapped":
            return right((packed >> 4) | (packed << 4), absmax, absmax_8bit, code, offset, *rest)
        if kind == "wrong table entry":
            weight = right(packed, absmax, absmax_8bit, code, offset, *rest)
            nibbles = torch.stack([packed >> 4, packed & 15], 1).reshape(weight.shape)
            return torch.where(nibbles == 3, weight * 1.33, weight)
        if kind == "transposed":
            return right(packed, absmax, absmax_8bit, code, offset, *rest).t().contiguous()
        if kind == "scales stale":
            return right(packed, absmax.flip(0), absmax_8bit.flip(0), code, offset, *rest)
        return right(packed, absmax, absmax_8bit, code, offset, *rest)

    return wrong


FAULTS = ("offset missing", "nibbles swapped", "wrong table entry", "transposed", "scales stale")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", ["", *FAULTS])
def test_faults_are_seen(fault: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = in_4bit(Projection(64, 64), dtype), torch.randn(3, 7, 64, dtype=dtype, requires_grad=True)
    monkeypatch.setattr(quantized_op, "by_bitsandbytes", faulty(fault))
    assert all((ratio > 2.0) == bool(fault) for ratio in ratios(module, x, validate="off"))
