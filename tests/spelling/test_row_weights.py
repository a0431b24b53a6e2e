"""Weights of experts go before the last product: found, as near to float64 as eager, and nothing wide is kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

import fxfuse.aot as aot
from fxfuse.backend import Backend
from fxfuse.validation import LIMITS, error_ratio

ROWS, NARROW, WIDE, EXPERTS = 24, 16, 48, 3


def experts(x: Tensor, w: Tensor, up: Tensor, down: Tensor, offsets: Tensor) -> Tensor:
    gate, value = torch._grouped_mm(x, up.transpose(1, 2), offs=offsets).chunk(2, dim=-1)
    return torch._grouped_mm(F.silu(gate) * value, down.transpose(1, 2), offs=offsets) * w.unsqueeze(-1)


def dense(x: Tensor, w: Tensor, up: Tensor, down: Tensor, offsets: Tensor) -> Tensor:
    """The same, expert by expert."""
    parts, start = [], 0
    for e, stop in enumerate(offsets.tolist()):
        gate, value = (x[start:stop] @ up[e].t()).chunk(2, dim=-1)
        parts.append((F.silu(gate) * value) @ down[e].t() * w[start:stop, None])
        start = stop
    return torch.cat(parts)


def read_twice(x: Tensor, w: Tensor, up: Tensor, down: Tensor, offsets: Tensor) -> Tensor:
    product = torch._grouped_mm(x[:, :NARROW].contiguous(), down.transpose(1, 2), offs=offsets)
    return product * w.unsqueeze(-1) + product.sum() * 0 + product


def to_narrower(x: Tensor, w: Tensor, up: Tensor, down: Tensor, offsets: Tensor) -> Tensor:
    return torch._grouped_mm(x, down, offs=offsets) * w.unsqueeze(-1)


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((ROWS, WIDE), (ROWS,), (EXPERTS, 2 * NARROW, WIDE), (EXPERTS, WIDE, NARROW))
    tensors = [torch.randn(s, generator=generator).bfloat16() for s in shapes]
    offsets = torch.tensor([8, 16, 24], dtype=torch.int32)
    return [tensors[0].requires_grad_(), tensors[1].sigmoid().requires_grad_(), *tensors[2:], offsets]


def results(function, inputs: list[Tensor]) -> list[Tensor]:
    out = function(*inputs)
    arriving = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, inputs[:2], arriving)]


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    found: list[fx.GraphModule] = []
    original = aot._finish_forward
    monkeypatch.setattr(aot, "_finish_forward", lambda gm, *a, **k: found.append(gm) or original(gm, *a, **k))
    torch._dynamo.reset()
    return found


def compiled(function, **options: object):
    return torch.compile(function, backend=Backend(strict=True, **options), fullgraph=True)  # type: ignore[arg-type]


def kept(gm: fx.GraphModule) -> list[tuple[int, ...]]:
    """The shapes of what a forward computes and keeps."""
    made = gm.graph.output_node().args[0][1:]
    return [tuple(map(int, map(lambda s: getattr(getattr(s, "node", s), "hint", s), n.meta["val"].shape)))
            for n in made if n.op != "placeholder" and isinstance(n.meta.get("val"), Tensor) and n.meta["val"].dtype == torch.bfloat16]


def test_as_near_to_float64_as_eager_and_nothing_wide_is_kept(forwards: list[fx.GraphModule]) -> None:
    inputs = data()
    truth = results(dense, [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in inputs])
    for a, b, t in zip(results(compiled(experts), inputs), results(experts, inputs), truth, strict=True):
        assert error_ratio(a, b, t) <= LIMITS[torch.bfloat16]
    assert (ROWS, WIDE) not in kept(forwards[0])


def test_left_out_the_product_is_kept(forwards: list[fx.GraphModule]) -> None:
    results(compiled(experts, exclude=("row_weights",)), data())
    assert (ROWS, WIDE) in kept(forwards[0])


@pytest.mark.parametrize("function", [read_twice, to_narrower])
def test_others_are_left_alone(function, forwards: list[fx.GraphModule]) -> None:
    inputs = data()
    if function is to_narrower:
        inputs[3] = inputs[3].contiguous()
    ours, eager = results(compiled(function), inputs), results(function, inputs)
    products = [n for n in forwards[0].graph.nodes if "_grouped_mm" in str(n.target)]
    assert [str(n.args[0]) for n in products if "rows" in str(n.args[0]) or "getitem" in str(n.args[0])] == []
    for a, b in zip(ours, eager, strict=True):
        assert (a.float() - b.float()).norm() <= 2e-2 * b.float().norm()
