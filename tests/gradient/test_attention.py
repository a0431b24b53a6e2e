"""Attention that models write out: values and gradients against float64, and which keys a mask hides."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fxfuse.attention import execution, hiding
from fxfuse.attention.hiding import mask_of, seen_keys
from fxfuse.attention.known_masks import forget_masks
from fxfuse.backend import Backend
from fxfuse.pattern_trace import pattern_program
from fxfuse.program import Program
from fxfuse.reporting import records
from fxfuse.validation import LIMITS, error_ratio

B, HEADS, GROUPS, LENGTH, WIDTH = 2, 2, 3, 70, 16
LEAST = torch.finfo(torch.float32).min


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sixteen queries at once, keys in steps of eight."""
    monkeypatch.setattr(execution, "SCORES_BYTES", 1)
    monkeypatch.setattr(execution, "STEP", 16)
    monkeypatch.setattr(hiding, "STEP", 8)
    forget_masks()
    torch._dynamo.reset()
    yield
    forget_masks()


def repeated(x: Tensor, groups: int) -> Tensor:
    """[b, kv, n, w] -> [b, kv * groups, n, w], as models write it."""
    b, kv, n, w = x.shape
    return x[:, :, None, :, :].expand(b, kv, groups, n, w).reshape(b, kv * groups, n, w)


def capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.matmul(q, repeated(k, GROUPS).transpose(2, 3)) * WIDTH**-0.5
    scores = torch.tanh(scores / 20.0) * 20.0 + mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, repeated(v, GROUPS))


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.matmul(q, repeated(k, GROUPS).transpose(-1, -2)) / WIDTH**0.5
    return torch.matmul(torch.softmax(scores + mask, -1), repeated(v, GROUPS)).transpose(1, 2)


def selected(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """A boolean mask, that hides where it is true; weights that are no softmax."""
    scores = torch.matmul(q, repeated(k, GROUPS).transpose(2, 3)) * WIDTH**-0.5
    return torch.matmul(torch.where(mask < 0, 0.0, torch.sigmoid(scores)), repeated(v, GROUPS))


SINKS = torch.linspace(-2, 3, HEADS * GROUPS)


def with_sinks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """One more score for every query, which takes weight and has no value."""
    scores = torch.matmul(q, repeated(k, GROUPS).transpose(2, 3)) * WIDTH**-0.5 + mask
    sinks = SINKS.to(q.dtype).reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    both = torch.cat([scores, sinks], dim=-1)
    both = both - both.max(dim=-1, keepdim=True).values
    weights = F.softmax(both, dim=-1, dtype=both.dtype)[..., :-1]
    return torch.matmul(weights, repeated(v, GROUPS))


def unmasked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.matmul(torch.softmax(torch.matmul(q, repeated(k, GROUPS).transpose(2, 3)), -1), repeated(v, GROUPS))


def causal(dtype: torch.dtype = torch.float32, window: int = LENGTH, padded: int = 0) -> Tensor:
    """[b, 1, n, n]: the queries before ``padded`` see nothing."""
    query, key = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    seen = (key <= query) & (key > query - window) & (key >= padded)
    return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype).expand(B, 1, -1, -1).contiguous()


def operands(dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = ((B, LENGTH, HEADS * GROUPS, WIDTH), (B, LENGTH, HEADS, WIDTH), (B, LENGTH, HEADS, WIDTH))
    made = [torch.randn(s, generator=generator) * scale for s in shapes]
    return [t.to(dtype).transpose(1, 2).detach().requires_grad_() for t in made]


def results(function: Callable[..., Tensor], inputs: list[Tensor], mask: Tensor) -> list[Tensor]:
    out = function(*inputs, mask)
    arriving = torch.randn(out.shape, generator=torch.Generator().manual_seed(6)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, arriving)]


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, backend=Backend(strict=True), fullgraph=True, dynamic=True)


def sites(function: Callable[..., Tensor], *inputs: Any, **options: Any) -> list[records.Site]:
    """What is said of a function's attention."""
    found: list[records.Site] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable:
        record = records.GraphRecord("whole")
        rewritten = Backend(strict=True, **options).rewrite(gm, record)
        found.extend(site for site in record.sites if site.rule == "attention")
        return rewritten.forward

    torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    return found


# --- values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("function", "dtype"), [
    (capped, torch.float32), (capped, torch.bfloat16), (with_sinks, torch.float32), (with_sinks, torch.bfloat16),
    (plain, torch.bfloat16), (selected, torch.float32), (unmasked, torch.float32),
])  # fmt: skip
def test_as_near_to_float64_as_eager(function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    fused, mask = compiled(function), causal(dtype)
    for scale in (1e-2, 1.0, 4.0):
        inputs = operands(dtype, scale)
        doubled = [t.detach().double().requires_grad_() for t in inputs]
        truth = results(function, doubled, mask.double())
        ours, eager = results(fused, inputs, mask), results(function, inputs, mask)
        for name, a, b, t in zip(("out", "dq", "dk", "dv"), ours, eager, truth, strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            assert error_ratio(a, b, t) <= LIMITS[dtype], (name, scale)


@pytest.mark.parametrize("mask", [causal(window=20), causal(padded=30), torch.zeros(B, 1, LENGTH, LENGTH)],
                         ids=["sliding window", "padding in front", "nothing hidden"])
def test_other_masks(mask: Tensor) -> None:
    inputs = operands(torch.float32)
    for a, b in zip(results(compiled(capped), inputs, mask), results(capped, inputs, mask), strict=True):
        assert (a - b).norm() <= 2e-6 * b.norm()


def test_under_autocast_products_are_in_its_dtype() -> None:
    inputs, mask = operands(torch.float32), causal()
    with torch.autocast("cpu", torch.bfloat16):
        ours, eager = (results(f, inputs, mask) for f in (compiled(plain), plain))
    for a, b in zip(ours, eager, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).float().norm() <= 2e-2 * b.float().norm()


def test_scores_are_not_kept() -> None:
    kept: list[int] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t)
    fused, inputs, mask = compiled(capped), operands(torch.float32), causal()
    fused(*inputs, mask)
    with hooks:
        fused(*inputs, mask)
    assert max(kept) <= max(mask.numel(), inputs[0].numel()) < B * HEADS * GROUPS * LENGTH**2


# --- what is not fused ---------------------------------------------------------------------------------------


def also_returns_weights(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.softmax(torch.matmul(q, repeated(k, GROUPS).transpose(2, 3)) + mask, -1)
    return torch.matmul(weights, repeated(v, GROUPS)), weights


def test_weights_that_are_returned_keep_the_scores() -> None:
    site = sites(also_returns_weights, *operands(torch.float32), causal())[0]
    assert site.status == "declined"
    assert "read by something else" in site.reason


def test_a_bias_that_learns_keeps_the_scores() -> None:
    site = sites(plain, *operands(torch.float32), causal().requires_grad_())[0]
    assert site.status == "declined"
    assert "needs a gradient" in site.reason


def test_sinks_are_part_of_the_program() -> None:
    site = sites(with_sinks, *operands(torch.float32), causal())[0]
    assert site.status == "fused"
    assert "sigmoid" in site.program


def test_a_last_column_that_is_kept_is_no_sink() -> None:
    def keeping(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = torch.cat([torch.matmul(q, repeated(k, GROUPS).transpose(2, 3))[..., :-1], mask[..., :1].expand(-1, 6, -1, -1)], -1)
        return torch.matmul(torch.softmax(scores, -1), repeated(v, GROUPS))

    assert not [s for s in sites(keeping, *operands(torch.float32), causal()) if s.status == "fused"]


def test_dropout_between_the_products_is_not_an_attention_of_ours() -> None:
    def dropping(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        weights = F.dropout(torch.softmax(torch.matmul(q, repeated(k, GROUPS).transpose(2, 3)) + mask, -1), 0.5)
        return torch.matmul(weights, repeated(v, GROUPS))

    assert not [s for s in sites(dropping, *operands(torch.float32), causal()) if s.status == "fused"]


def test_the_rule_can_be_left_out() -> None:
    site = sites(capped, *operands(torch.float32), causal(), exclude=("attention",))[0]
    assert site.reason == "excluded by the caller"


# --- which operand hides keys --------------------------------------------------------------------------------


def program(function: Callable[..., Tensor], **others: Tensor) -> tuple[Program, str]:
    made = pattern_program(function, {"s": torch.randn(2, 2, 8, 12), **others}, {})
    return made, next(a.name for a in made.arguments if a.name == "s")


WIDE = torch.zeros(2, 1, 8, 12)


@pytest.mark.parametrize("function", [
    lambda s, m: torch.softmax(s + m, -1),
    lambda s, m: torch.softmax(torch.tanh(s / 50) * 50 + m, -1),
    lambda s, m: torch.sigmoid(s + m),
], ids=["softmax", "capped", "sigmoid"])  # fmt: skip
def test_an_added_operand_hides(function: Callable[..., Tensor]) -> None:
    found, scores = program(function, m=WIDE)
    assert mask_of(found, scores) is not None


@pytest.mark.parametrize("function", [
    lambda s, m: torch.softmax(torch.tanh((s + m) / 50) * 50, -1),
    lambda s, m: torch.softmax(s * m, -1),
    lambda s, m: torch.softmax(s + m, -1) - torch.softmax(s, -1),
    lambda s, m: torch.softmax(s + m, -1) * s.mean(-1, keepdim=True),
    lambda s, m: torch.tanh(s + m),
], ids=["capped after it", "multiplied", "added to one of two", "a mean over all keys", "no zero"])  # fmt: skip
def test_an_operand_without_which_keys_have_a_part_does_not(function: Callable[..., Tensor]) -> None:
    found, scores = program(function, m=WIDE)
    assert mask_of(found, scores) is None


CHUNKS = tuple((start, min(start + 16, LENGTH)) for start in range(0, LENGTH, 16))
HALVES = ((0, 40), (40, LENGTH))


def test_keys_behind_the_queries_are_left_out() -> None:
    assert seen_keys(causal(), None, CHUNKS) == ((0, 16), (0, 32), (0, 48), (0, 64), (0, 70))


def test_keys_before_the_window_are_left_out() -> None:
    assert seen_keys(causal(window=9), None, CHUNKS) == ((0, 16), (8, 32), (24, 48), (40, 64), (56, 70))


def test_a_query_that_sees_nothing_sees_everything() -> None:
    assert seen_keys(causal(padded=20), None, CHUNKS) == ((0, 70), (0, 70), (16, 48), (16, 64), (16, 70))


def test_a_mask_that_was_changed_is_read_again() -> None:
    mask = causal()
    seen_keys(mask, None, CHUNKS)
    mask.zero_()
    assert set(seen_keys(mask, None, CHUNKS)) == {(0, 70)}


def test_layers_that_share_a_mask_wait_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Tensor] = []
    read = hiding._read
    monkeypatch.setattr(hiding, "_read", lambda *a: reads.append(a[0]) or read(*a))
    fused, inputs, mask = compiled(capped), operands(torch.float32), causal()
    results(fused, inputs, mask)
    results(fused, inputs, mask)
    assert len([m for m in reads if m.shape[-1] == LENGTH]) == 1


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The masks that the host reads."""
    reads: list[Tensor] = []
    read = hiding._read
    monkeypatch.setattr(hiding, "_read", lambda *a: reads.append(a[0]) or read(*a))
    return reads


def test_layers_that_take_turns_wait_once_for_each_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where more is asked of a mask than one question."""
    reads = counted(monkeypatch)
    masks = [causal(), causal(window=9), causal(padded=20)]
    for _ in range(3):
        for mask in masks:
            seen_keys(mask, None, CHUNKS)
            seen_keys(mask, None, HALVES)
    assert len(reads) == 2 * len(masks)


def test_views_of_one_mask_are_told_apart() -> None:
    mask = torch.stack([causal()[0], causal(window=9)[0]])
    assert seen_keys(mask[:1], None, CHUNKS) == seen_keys(causal(), None, CHUNKS)
    assert seen_keys(mask[1:], None, CHUNKS) == seen_keys(causal(window=9), None, CHUNKS)


def test_another_mask_at_the_address_of_one_that_is_gone_is_read() -> None:
    first, second = causal(), causal(window=9)
    for mask in (first, second) * 4:
        copy, wanted = mask.clone(), hiding._read(mask, None, CHUNKS)  # the allocator gives the address again
        assert seen_keys(copy, None, CHUNKS) == wanted
        del copy


def test_what_was_read_does_not_hold_the_mask() -> None:
    mask = causal()
    gone = weakref.ref(mask.untyped_storage())
    storage = StorageWeakRef(mask.untyped_storage())
    seen_keys(mask, None, CHUNKS)
    del mask
    assert storage.expired()
    assert gone() is None


def test_a_mask_of_inference_mode_is_read_each_time() -> None:
    with torch.inference_mode():
        mask = causal()
        before = seen_keys(mask, None, CHUNKS)
        mask.zero_()
        assert set(seen_keys(mask, None, CHUNKS)) == {(0, 70)} != set(before)


def test_a_changed_mask_takes_part_in_the_next_call() -> None:
    """In place, between two calls of one graph, and between a forward and its backward that is then refused by autograd."""
    fused, inputs, mask = compiled(capped), operands(torch.float32), causal()
    results(fused, inputs, mask)
    mask.copy_(causal(window=9))
    for a, b in zip(results(fused, inputs, mask), results(capped, inputs, mask), strict=True):
        assert (a - b).norm() <= 2e-6 * b.norm()
    out = fused(*inputs, mask)
    mask.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_planted_no_count_of_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written past torch's count, a mask gives what it gave before: the test above would see that."""
    fused, inputs, mask = compiled(capped), operands(torch.float32), causal(window=9)
    results(fused, inputs, mask)
    mask.data.copy_(causal())
    wrong = results(fused, inputs, mask)
    assert any((a - b).norm() > 1e-3 * b.norm() for a, b in zip(wrong, results(capped, inputs, mask), strict=True))


def test_planted_one_key_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    read = hiding._read
    monkeypatch.setattr(hiding, "_read", lambda *a: tuple((first, last - 9) for first, last in read(*a)))
    inputs, mask = operands(torch.float32), causal()
    fused = torch.compile(capped, backend=Backend(strict=True, validate="off"), fullgraph=True)
    wrong = results(fused, inputs, mask)
    assert all((a - b).norm() > 1e-3 * b.norm() for a, b in zip(wrong, results(capped, inputs, mask), strict=True))
