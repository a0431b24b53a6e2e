"""Rows that a permutation picks: found where it is proven, exact, and without a sorted sum of gradients in the backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from fxfuse.backend import Backend
from fxfuse.canonical import canonicalize
from fxfuse.row_selection.op import collect_rows, spread_rows
from fxfuse.validation import LIMITS, error_ratio

TOKENS, CHOSEN, WIDTH, EXPERTS = 12, 3, 8, 5


def routed(x: Tensor, scores: Tensor) -> Tensor:
    """As expert layers write it."""
    weights, experts = torch.topk(scores, CHOSEN, dim=-1)
    ids, perm = torch.sort(experts.reshape(-1))
    rows = x[perm // CHOSEN]
    rows = rows.masked_fill((ids >= EXPERTS).unsqueeze(-1), 0.0)
    rows = torch.tanh(rows) * weights.reshape(-1)[perm].unsqueeze(-1)
    inverse = torch.empty_like(perm)
    inverse[perm] = torch.arange(perm.size(0), device=x.device)
    return rows[inverse].view(x.size(0), CHOSEN, x.size(1)).sum(dim=1)


def by_argsort(x: Tensor, scores: Tensor) -> Tensor:
    weights, experts = torch.topk(scores, CHOSEN, dim=-1)
    perm = experts.flatten().argsort()
    rows = torch.index_select(x, 0, torch.div(perm, CHOSEN, rounding_mode="floor")) * weights.flatten()[perm][:, None]
    return rows[torch.argsort(perm)].reshape(x.size(0), CHOSEN, -1).sum(1)


def to_another_number(x: Tensor, scores: Tensor) -> Tensor:
    """The indices stop before the last token: rows of it are never read."""
    perm = torch.topk(scores, CHOSEN, dim=-1)[1].reshape(-1)[: -CHOSEN].sort()[1]
    return x[perm // CHOSEN] * 2


def of_values(x: Tensor, scores: Tensor) -> Tensor:
    """What a sort gives first is no permutation."""
    ids = torch.topk(scores, CHOSEN, dim=-1)[1].reshape(-1).sort()[0]
    return x[ids] * 2


def overwritten(x: Tensor, scores: Tensor) -> Tensor:
    """An inverse that is changed after it was written."""
    perm = torch.sort(scores[:, 0])[1]
    inverse = torch.empty_like(perm)
    inverse[perm] = torch.arange(perm.size(0), device=x.device)
    inverse[0] = 3
    return x[inverse] * 2


def data(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(TOKENS, n, generator=generator).to(dtype).requires_grad_() for n in (WIDTH, EXPERTS)]


def results(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    out = function(*inputs)
    arriving = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, inputs, arriving, allow_unused=True)]


def graphs(function: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """The forward and backward graph that the backend makes."""
    import fxfuse.aot as aot

    found: list[fx.GraphModule] = []
    original = aot._finish
    monkeypatch.setattr(aot, "_finish", lambda gm, *a, **k: found.append(gm) or original(gm, *a, **k))
    torch._dynamo.reset()
    results(torch.compile(function, backend=Backend(strict=True), fullgraph=True, dynamic=True), data())
    return found


def named(gms: list[fx.GraphModule], name: str) -> int:
    return sum(name in str(node.target) for gm in gms for node in gm.graph.nodes)


@pytest.mark.parametrize(("function", "dtype"), [(routed, torch.float32), (routed, torch.bfloat16), (by_argsort, torch.float32)])
def test_as_near_to_float64_as_eager(function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    inputs = data(dtype)
    truth = results(function, [t.detach().double().requires_grad_() for t in inputs])
    torch._dynamo.reset()
    fused = torch.compile(function, backend=Backend(strict=True, rules=("row_selection",)), fullgraph=True, dynamic=True)
    for a, b, t in zip(results(fused, inputs), results(function, inputs), truth, strict=True):
        assert error_ratio(a, b, t) <= LIMITS[dtype]


def test_gradients_are_read_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three reads forward, three backward and one again; no sum over indices. The mask that hides no expert is gone."""
    made = graphs(routed, monkeypatch)
    assert named(made, "spread_rows") == 4
    assert named(made, "collect_rows") == 3
    assert named(made, "index_put") == 0
    assert named(made, "where") + named(made, "masked_fill") == 0


@pytest.mark.parametrize("function", [to_another_number, of_values, overwritten])
def test_other_indices_are_left_alone(function: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    made = graphs(function, monkeypatch)
    assert named(made, "spread_rows") + named(made, "collect_rows") == 0
    inputs = data()
    torch._dynamo.reset()
    fused = torch.compile(function, backend=Backend(strict=True), fullgraph=True, dynamic=True)
    for a, b in zip(results(fused, inputs), results(function, inputs), strict=True):
        assert (a is None and b is None) or torch.allclose(a, b)


def test_it_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(routed, backend=Backend(strict=True, exclude=("row_selection",)), fullgraph=True)
    assert torch.allclose(results(compiled, data())[1], results(routed, data())[1])


def test_derivatives_of_any_order() -> None:
    perm = torch.randperm(TOKENS * CHOSEN, generator=torch.Generator().manual_seed(2))
    source, place = perm // CHOSEN, torch.argsort(perm)
    x = torch.randn(TOKENS, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(TOKENS * CHOSEN, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: spread_rows(x.square(), source, place, CHOSEN).square(), (x,))
    assert torch.autograd.gradgradcheck(lambda y: collect_rows(y.square(), source, place, CHOSEN).square(), (y,))


def test_transposes_of_each_other() -> None:
    perm = torch.randperm(TOKENS * CHOSEN, generator=torch.Generator().manual_seed(2))
    source, place = perm // CHOSEN, torch.argsort(perm)
    x, y = torch.randn(TOKENS, 4, dtype=torch.float64), torch.randn(TOKENS * CHOSEN, 4, dtype=torch.float64)
    left = (spread_rows(x, source, place, CHOSEN) * y).sum()
    assert torch.allclose(left, (x * collect_rows(y, source, place, CHOSEN)).sum())


def masked(limit: int, relation: str = "ge", of: str = "indices") -> Callable[..., Tensor]:
    def function(x: Tensor, scores: Tensor) -> Tensor:
        values, indices = torch.topk(scores, 1, dim=-1)
        chosen = indices if of == "indices" else values.long()
        mask = chosen >= limit if relation == "ge" else chosen > limit
        return x.masked_fill(mask, 7.0) * 2

    return function


@pytest.mark.parametrize(("function", "selections"), [
    (masked(EXPERTS), 0), (masked(EXPERTS + 3), 0), (masked(EXPERTS - 1, "gt"), 0),
    (masked(EXPERTS - 1), 1), (masked(EXPERTS - 2, "gt"), 1), (masked(EXPERTS, of="values"), 1),
])
def test_masks_that_are_false_whatever_comes(function: Callable[..., Tensor], selections: int) -> None:
    found: list[fx.GraphModule] = []

    def look(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        canonicalize(gm)
        found.append(gm)
        return gm.forward

    inputs = data()
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=look, fullgraph=True)
    assert torch.equal(compiled(*inputs), function(*inputs))
    assert named(found, "where") == selections


