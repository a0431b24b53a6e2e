"""``fuse`` makes one fused op of a plain function; ``rewrite`` makes one fused graph of a graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfuse
from fxfuse.errors import UnsupportedGraph
from fxfuse.fused_op import rows


def rms_norm(x: Tensor, w: Tensor, eps: float = 1e-6) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w


def gate(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def statistics(x: Tensor) -> dict[str, Tensor]:
    mean = x.mean(-1, keepdim=True)
    return {"centred": x - mean, "variance": (x - mean).square().mean(-1)}


def data(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize(("function", "inputs"), [
    (rms_norm, (data(2, 3, 4), data(4))), (gate, (data(3, 4), data(3, 4))),
    (lambda x: torch.tanh(x / 30) * 30, (data(5, 3),)),
    (lambda q, c, s: q * c + torch.cat((-q[..., 2:], q[..., :2]), -1) * s, (data(2, 3, 4), data(3, 4), data(3, 4))),
], ids=["rms_norm", "gate", "softcap", "rope"])
def test_values_and_derivatives_of_any_order(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    fused = fxfuse.fuse(function)
    torch.testing.assert_close(fused(*inputs), function(*inputs), rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(fused, inputs)
    assert torch.autograd.gradgradcheck(fused, inputs)


def test_structured_results() -> None:
    x = data(3, 5)
    ours, expected = fxfuse.fuse(statistics)(x), statistics(x)
    assert ours.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-12, atol=1e-14)


def test_one_trace_for_any_number_of_rows() -> None:
    calls = []

    @fxfuse.fuse
    def f(x: Tensor, w: Tensor, eps: float = 1e-6) -> Tensor:
        calls.append(tuple(x.shape))
        return rms_norm(x, w, eps)

    w = data(4)
    f(data(5, 2, 4), w)
    once = len(calls)  # with looks at whether the number of rows matters
    for n in (3, 50, 0):
        f(data(5, n, 4), w)
    assert len(calls) == once
    f(data(4, 4), w)  # another number of dimensions
    f(data(5, 2, 4), w, eps=1e-3)  # another constant
    f(data(5, 2, 4, dtype=torch.float32), w.detach().float())  # other dtypes
    assert len(calls) == 4 * once


def test_constants_are_the_callers() -> None:
    x, w = data(3, 4), data(4)
    fused = fxfuse.fuse(rms_norm)
    for eps in (1e-6, 1.0):
        torch.testing.assert_close(fused(x, w, eps=eps), rms_norm(x, w, eps), rtol=1e-12, atol=1e-14)


def test_name_and_docstring_stay() -> None:
    assert fxfuse.fuse(rms_norm).__name__ == "rms_norm"


@pytest.mark.parametrize(("function", "named"), [
    (lambda x: torch.cumsum(x, -1) * 2, "cumsum"),
    (lambda x: (x @ x.T).exp() * 2, "matmul"),
    (lambda x: x.sum(0) * 2, "sum"),
], ids=["scan", "matmul", "columns"])
def test_what_stands_outside_is_named(function: Callable[..., Tensor], named: str) -> None:
    with pytest.raises(UnsupportedGraph, match=named):
        fxfuse.fuse(function)(data(4, 4))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(TypeError, match=r"takes a function of tensors, got Linear; for modules there is fxfuse\.optimize"):
        fxfuse.fuse(nn.Linear(2, 2))
    with pytest.raises(UnsupportedGraph, match="no argument is a tensor"):
        fxfuse.fuse(rms_norm)(1, 2)
    with pytest.raises(TypeError, match="missing a required argument"):
        fxfuse.fuse(rms_norm)(data(2, 2))
    with pytest.raises(UnsupportedGraph, match="fused functions take plain tensors"):
        fxfuse.fuse(gate)(data(3, 4).detach().to_sparse(), data(3, 4))


def test_under_functorch() -> None:
    x, w = data(3, 4).detach(), data(4).detach()
    fused = fxfuse.fuse(rms_norm)
    ours = torch.func.jacrev(fused)(x, w)
    torch.testing.assert_close(ours, torch.func.jacrev(rms_norm)(x, w), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(torch.vmap(fused, (0, None))(x, w), rms_norm(x, w), rtol=1e-12, atol=1e-14)


def test_inside_torch_compile() -> None:
    x, w = data(3, 4), data(4)
    fused = fxfuse.fuse(rms_norm)
    fused(x, w)
    compiled = torch.compile(lambda x, w: fused(x, w).sin(), backend="aot_eager")
    torch.testing.assert_close(compiled(x, w), rms_norm(x, w).sin(), rtol=1e-12, atol=1e-14)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate, self.up = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return F.silu(self.gate(y)) * self.up(y)


def symbolic(module: nn.Module, x: Tensor) -> torch.fx.GraphModule:
    return torch.fx.symbolic_trace(module)


def exported(module: nn.Module, x: Tensor) -> torch.fx.GraphModule:
    return torch.export.export(module, (x.detach(),)).module()  # type: ignore[return-value]


@pytest.mark.parametrize("trace", [symbolic, exported], ids=lambda f: f.__name__)
def test_a_rewritten_graph_is_fused_and_differentiable(trace: Callable[..., torch.fx.GraphModule]) -> None:
    module, x = MLP().double(), data(3, 8)
    gm = trace(module, x)
    before = gm.code
    fused = fxfuse.rewrite(gm, (x,))
    assert gm.code == before
    assert sum(node.target is rows for node in fused.graph.nodes) == 2
    torch.testing.assert_close(fused(x), module(x), rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(fused, (x,))
    assert torch.autograd.gradgradcheck(fused, (x,))


def test_a_rewritten_graph_shares_parameters_and_can_be_copied_by_its_text() -> None:
    module, x = MLP(), torch.randn(3, 8)
    fused = fxfuse.rewrite(torch.fx.symbolic_trace(module), (x,))
    assert dict(fused.named_parameters())["gate.weight"] is module.gate.weight
    again = torch.fx.GraphModule(fused, fused.graph)
    assert torch.equal(again(x), fused(x))


def test_a_dynamo_graph_needs_no_example_inputs() -> None:
    module, x = MLP(), torch.randn(3, 8)
    found: list[torch.fx.GraphModule] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        found.append(fxfuse.rewrite(gm))
        return found[0].forward

    torch.testing.assert_close(torch.compile(module, backend=backend)(x), module(x), rtol=1e-5, atol=1e-6)
    assert sum(node.target is rows for node in found[0].graph.nodes) == 2


def test_a_graph_without_facts_asks_for_inputs() -> None:
    with pytest.raises(ValueError, match="pass example_inputs"):
        fxfuse.rewrite(torch.fx.symbolic_trace(MLP()))
    with pytest.raises(TypeError, match=r"takes a torch\.fx\.GraphModule, got MLP"):
        fxfuse.rewrite(MLP())  # type: ignore[arg-type]
