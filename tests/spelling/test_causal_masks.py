"""Masks that are plain causal are proven so, and library attention keeps its causal form; every other mask stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfuse.backend import Backend
from fxfuse.reporting import records
from tests.model.builders import causal_lm

HEADS, GROUPS, WIDTH = 2, 3, 8


def positions(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of queries [n, 1] and keys [1, n]."""
    at = torch.arange(x.shape[2], device=x.device)
    return at[:, None], at[None, :]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    b, kv, n, w = k.shape
    k, v = (t[:, :, None].expand(b, kv, GROUPS, n, w).reshape(b, kv * GROUPS, n, w) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=False)


def comparison(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    query, key = positions(q)
    return attend(q, k, v, (key <= query).expand(q.shape[0], 1, -1, -1))


def triangle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v, torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()[None, None])


def combined(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    query, key = positions(q)
    return attend(q, k, v, ((key <= query) & (query >= 0) & ~(key < 0))[None, None])


def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    query, key = positions(q)
    return attend(q, k, v, ((key <= query) & (key > query - 40))[None, None])


def one_ahead(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    query, key = positions(q)
    return attend(q, k, v, (key <= query + 1)[None, None])


def strictly_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    query, key = positions(q)
    return attend(q, k, v, ((key < query) | (query == 0))[None, None])


def numbers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    query, key = positions(q)
    return attend(q, k, v, torch.where(key <= query, 0.0, -1e4)[None, None])


def data_dependent(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    query, key = positions(q)
    return attend(q, k, v, ((key <= query) & (k[0, 0, :, 0] < 1e9))[None, None])


def operands(length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, h, length, WIDTH, generator=generator).requires_grad_() for h in (HEADS * GROUPS, HEADS, HEADS)]


def compiled(function: Callable[..., Any], dynamic: bool) -> tuple[Callable[..., Any], list[records.GraphRecord]]:
    """The function under the backend, and the records of its graphs."""
    found: list[records.GraphRecord] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable:
        found.append(records.GraphRecord("whole"))
        rewritten = Backend(strict=True).rewrite(gm, found[-1])
        assert rewritten is not None
        found[-1].forward_source = rewritten.code
        return rewritten.forward

    torch._dynamo.reset()
    return torch.compile(function, backend=backend, dynamic=dynamic), found


def attention_sites(found: list[records.GraphRecord]) -> list[records.Site]:
    return [site for record in found for site in record.sites if site.rule == "attention"]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("function", [comparison, triangle, combined])
def test_a_causal_mask_is_dropped_and_heads_are_not_repeated(function: Callable[..., Tensor], dynamic: bool) -> None:
    fused, found = compiled(function, dynamic)
    inputs = operands(24)
    ours, eager = fused(*inputs), function(*inputs)
    assert (ours - eager).norm() <= 1e-6 * eager.norm()
    arriving = torch.randn_like(eager)
    for a, b in zip(*(torch.autograd.grad(out, inputs, arriving) for out in (ours, eager)), strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()
    assert [site.status for site in attention_sites(found)] == ["served"]
    assert "is_causal = True" in found[0].forward_source
    assert "enable_gqa = True" in found[0].forward_source
    assert "expand" not in found[0].forward_source


@pytest.mark.parametrize("function", [windowed, one_ahead, strictly_before, data_dependent])
def test_another_mask_stays(function: Callable[..., Tensor]) -> None:
    fused, found = compiled(function, True)
    inputs = operands(24)
    assert torch.equal(fused(*inputs), function(*inputs))
    site = attention_sites(found)[0]
    assert (site.status, site.reason) == ("declined", "its mask is not proven to be plain causal")


def test_a_window_that_no_length_known_now_reaches_is_none() -> None:
    fused, found = compiled(windowed, False)
    fused(*operands(24))
    assert attention_sites(found)[0].status == "served"


def test_a_mask_of_numbers_stays() -> None:
    fused, found = compiled(numbers, True)
    fused(*operands(24))
    assert "holds numbers" in attention_sites(found)[0].reason


def test_a_mask_from_outside_stays() -> None:
    fused, found = compiled(attend, True)
    fused(*operands(24), torch.ones(24, 24, dtype=torch.bool).tril())
    assert attention_sites(found)[0].status == "declined"


def whole(model: nn.Module, length: int) -> Tensor:
    ids = torch.randint(0, 96, (2, length), generator=torch.Generator().manual_seed(length))
    return model(input_ids=ids, labels=ids, use_cache=False).loss


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 24}], ids=["causal", "window"])
def test_a_model_traced_as_a_whole(changes: dict[str, int]) -> None:
    model, eager = (causal_lm("mistral", 1, **{"sliding_window": None, **changes}) for _ in range(2))
    fused, found = compiled(model, True)
    for length in (16, 40):  # shorter than the window, and longer
        assert (whole(fused, length) - whole(eager, length)).abs() <= 1e-5
    assert {site.status for site in attention_sites(found)} == {"declined" if changes else "served"}
