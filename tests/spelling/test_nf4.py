"""A 4-bit linear is read for what it is, however bitsandbytes and PEFT write it; what is not one is left, and named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxfuse import backend
from fxfuse.backend import Backend
from fxfuse.quantized_op import dequantize_4bit
from fxfuse.reporting.records import GraphRecord, Site
from tests.model.quantized_models import in_4bit, with_adapters

bnb = pytest.importorskip("bitsandbytes")


class Read:
    """The graphs that a backend makes of a module's training call, and their sites."""

    def __init__(self, module: Callable[..., Any], *inputs: Tensor, grad: bool = True, **options: Any) -> None:
        self.graphs: list[fx.GraphModule] = []
        self.sites: list[Site] = []
        chosen = Backend(strict=True, remainder="eager", validate="off", **options)

        def compiler(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            record = GraphRecord("whole")
            self.graphs.append(chosen.rewrite(gm, record))
            self.sites += record.sites
            return gm.forward

        torch.compiler.reset()
        with torch.set_grad_enabled(grad):
            torch.compile(module, backend=compiler, dynamic=True)(*inputs)

    def calls(self, target: Any) -> list[fx.Node]:
        return [node for gm in self.graphs for node in gm.graph.nodes if node.target is target]

    def names(self) -> str:
        return " ".join(str(node.target) for gm in self.graphs for node in gm.graph.nodes)

    def nf4(self) -> list[tuple[str, str]]:
        return [(site.module, site.status) for site in self.sites if site.rule == "nf4_linear"]


class Projection(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.proj = nn.Linear(64, 96, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def linear(compute_dtype: torch.dtype | None = torch.bfloat16, bias: bool = False, **options: Any) -> nn.Module:
    return in_4bit(Projection(bias), compute_dtype, **options)


def data(grad: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 5, 64, dtype=dtype, requires_grad=grad)


@pytest.mark.parametrize("grad", [True, False], ids=["input with gradient", "input without"])
@pytest.mark.parametrize("options", [
    {}, {"compress_statistics": False}, {"quant_type": "fp4"}, {"quant_storage": torch.bfloat16}, {"quant_storage": torch.float32},
    {"compute_dtype": torch.float16}, {"compute_dtype": torch.float32}, {"compute_dtype": None},
], ids=str)  # fmt: skip
def test_the_layer_of_bitsandbytes(options: dict[str, Any], grad: bool) -> None:
    read = Read(linear(**options), data(grad))
    (weight,), (product,) = read.calls(dequantize_4bit), read.calls(torch._C._nn.linear)
    dtype = options.get("compute_dtype", torch.bfloat16) or torch.float32
    assert weight.args[5:] == (64, options.get("quant_type", "nf4"), [96, 64], dtype)
    assert (weight.args[2] is None) == (options.get("compress_statistics") is False)
    assert product.args[1] is weight
    assert "gemm_4bit" not in read.names()
    assert "autograd_function_apply" not in read.names()
    assert read.nf4() == [("proj", "fused")]


def test_a_bias() -> None:
    layer = linear(bias=True)
    layer(data())  # the first call changes the bias' dtype in place
    read = Read(layer, data())
    (product,) = read.calls(torch._C._nn.linear)
    assert product.args[2] is not None
    assert read.nf4() == [("proj", "fused")]


def test_an_input_of_the_compute_dtype_is_not_cast() -> None:
    read = Read(linear(torch.bfloat16), data(dtype=torch.bfloat16))
    (product,) = read.calls(torch._C._nn.linear)
    assert product.args[0].op == "placeholder"
    assert read.calls(torch.ops.aten.to.dtype) == []


def test_everything_that_varies_from_layer_to_layer_is_an_input() -> None:
    (weight,) = Read(linear(), data()).calls(dequantize_4bit)
    assert [operand.op for operand in weight.args[:5]] == ["placeholder"] * 5


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(64, 64, bias=False), nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.q_proj(x), self.k_proj(x)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("told", [True, False], ids=["bitsandbytes adapter", "plain adapter"])
def test_under_the_adapters_of_peft(dropout: float, told: bool) -> None:
    """PEFT has an adapter of its own for 4-bit layers, which it takes for models that say that they are in 4 bits."""
    model = in_4bit(Attention(), torch.bfloat16)
    model.is_loaded_in_4bit = told
    read = Read(with_adapters(model, target_modules=["q_proj", "k_proj"], lora_dropout=dropout).base_model.model, data())
    assert [node.args[7] for node in read.calls(dequantize_4bit)] == [[64, 64], [32, 64]]
    assert sorted(read.nf4()) == [("k_proj.base_layer", "fused"), ("q_proj.base_layer", "fused")]


def test_autocast_in_the_compute_dtype() -> None:
    def step(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    layer = linear(torch.bfloat16)
    assert [status for _, status in Read(step, data()).nf4()] == ["fused"]


# ---- near misses ---------------------------------------------------------------------------------------------


def declined(read: Read, because: str) -> None:
    """The graph is as bitsandbytes made it, and the report says why."""
    assert read.calls(dequantize_4bit) == []
    sites = [site for site in read.sites if site.rule == "nf4_linear"]
    assert [site.status for site in sites] == ["declined"]
    assert because in sites[0].reason


def test_excluded() -> None:
    read = Read(linear(), data(), exclude=("nf4_linear",))
    declined(read, "excluded")
    assert "autograd_function_apply" in read.names()


def test_not_among_the_chosen_rules() -> None:
    declined(Read(linear(), data(), rules=("rms_norm",)), "not among")


def test_alone_among_the_chosen_rules() -> None:
    assert Read(linear(), data(), rules=("nf4_linear",)).nf4() == [("proj", "fused")]


def test_without_gradients_the_kernels_for_few_rows_stay() -> None:
    read = Read(linear(), data(grad=False), grad=False)
    declined(read, "no gradient")
    assert "gemm_4bit" in read.names()


def test_autocast_in_another_dtype() -> None:
    def step(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    layer = linear(torch.float32)
    declined(Read(step, data()), "autocast")


def test_a_function_with_another_backward() -> None:
    """The same forward, but a gradient of its own: not the derivative of a linear."""

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, packed: Tensor, absmax: Tensor) -> Tensor:
            ctx.save_for_backward(packed, absmax)
            return torch.ops.bitsandbytes.gemm_4bit.default(x, packed, [96, 64], absmax, 64, "nf4")

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
            packed, absmax = ctx.saved_tensors
            weight = torch.ops.bitsandbytes.dequantize_4bit.default(packed, absmax, 64, "nf4", [96, 64], grad.dtype)
            return torch.matmul(grad, weight).mul(2.0), None, None

    weight = linear(compress_statistics=False).proj.weight
    read = Read(lambda x: Scaled.apply(x, weight.data, weight.quant_state.absmax), data())
    declined(read, "its backward is not")


def test_a_dequantization_by_hand() -> None:
    weight = linear().proj.weight

    def by_hand(x: Tensor) -> Tensor:
        return nn.functional.linear(x, bnb.functional.dequantize_4bit(weight.data, weight.quant_state))

    declined(Read(by_hand, data()), "bitsandbytes::dequantize_4bit, which is not read")


def test_integers_of_eight_bits() -> None:
    layer = bnb.nn.Linear8bitLt(64, 96, bias=False, has_fp16_weights=False)
    layer.load_state_dict(nn.Linear(64, 96, bias=False).state_dict())
    declined(Read(nn.Sequential(layer.to("cpu")), data()), "LLM.int8")


def test_floats_of_eight_bits() -> None:
    class Float8(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(96, 64).to(torch.float8_e4m3fn), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight.to(x.dtype) * 0.5)

    declined(Read(Float8(), data()), "float8")


def test_names_are_known_to_the_backend() -> None:
    assert backend.backend_from_options({"exclude": ["nf4_linear"]}).exclude == ("nf4_linear",)
