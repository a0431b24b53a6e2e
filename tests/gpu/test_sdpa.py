"""flash-attn-4 in the place of torch's kernels: as near to float32, in any layout that models give it, and taken by measurement."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxfuse.attention.flex import Form
from fxfuse.backend import Backend
from fxfuse.sdpa import layouts, library, trial
from fxfuse.sdpa.families import FAMILIES
from fxfuse.sdpa.library import Problem
from fxfuse.sdpa.trial import Choice
from fxfuse.validation import LIMITS, error_ratio

pytestmark = pytest.mark.skipif(not library.installed(), reason="flash-attn-4 is not installed")
CUDNN, FLASH = FAMILIES[:2]


def drawn(heads: int, length: int, width: int, dtype: torch.dtype = torch.bfloat16, order: str = "by length", batch: int = 2) -> Tensor:
    """[batch, heads, length, width], as projections leave it, as a part of wider rows, or contiguous."""
    if order == "contiguous":
        return torch.randn(batch, heads, length, width, device="cuda", dtype=dtype)
    wide = torch.randn(batch, length, heads * (3 if order == "part" else 1), width, device="cuda", dtype=dtype)
    return wide[:, :, :heads].transpose(1, 2)


@pytest.mark.parametrize("family", [CUDNN, FLASH], ids=lambda family: family.name)
@pytest.mark.parametrize("order", ["by length", "part", "contiguous"])
@pytest.mark.parametrize(("heads", "shared", "length", "width"), [(8, 2, 1024, 128), (8, 8, 517, 64), (7, 1, 300, 128)])
@pytest.mark.parametrize("causal", [True, False])
def test_as_near_to_float32_as_torchs(family: Any, order: str, heads: int, shared: int, length: int, width: int, causal: bool) -> None:
    operands = (drawn(heads, length, width, order=order), *(drawn(shared, length, width, order=order) for _ in range(2)))
    problem = Problem(tuple(Form.of(t) for t in operands), causal, None)  # type: ignore[arg-type]
    assert not library.why_not(problem)
    assert trial.worst_ratio(problem, family) <= LIMITS[torch.bfloat16]


@pytest.mark.parametrize("order", ["by length", "part", "contiguous"])
def test_results_lie_as_torchs_do(order: str) -> None:
    query, key, value = drawn(8, 256, 64, order=order), drawn(2, 256, 64, order=order), drawn(2, 256, 64, order=order)
    out, sums, rest = CUDNN.forward(query, key, value, True, None)
    ours, own_sums = library.forward(query, key, value, True, None)
    assert ours.stride() == out.stride()
    assert own_sums.stride() == sums.reshape(own_sums.shape).stride()
    arriving = torch.randn_like(out)
    for a, b in zip(library.backward(arriving, query, key, value, out, sums.reshape(own_sums.shape), True, None),
                    CUDNN.backward(arriving, query, key, value, out, sums, rest, True, None), strict=True):  # fmt: skip
        assert a.stride() == b.stride()


def test_what_it_has_no_kernel_for_is_left() -> None:
    def why(*operands: Tensor, causal: bool = True) -> str:
        return library.why_not(Problem(tuple(Form.of(t) for t in operands), causal, None))  # type: ignore[arg-type]

    query, key = drawn(8, 64, 64), drawn(8, 96, 64)
    assert "last key" in why(query, key, key)
    assert not why(query, key, key, causal=False)
    assert "16 bits" in why(*[query.float()] * 3)
    assert "not empty" in why(*[query[:, :, :0]] * 3)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query * 1.0, key * 1.0, value * 1.0, is_causal=True, enable_gqa=True)


def test_chosen_behind_a_step_and_right_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXFUSE_SDPA", "measure")
    monkeypatch.setattr(layouts, "_now", layouts._Now())
    monkeypatch.setattr(layouts, "_layouts", {})
    monkeypatch.setattr(layouts, "_shared", {})
    torch.use_deterministic_algorithms(False)  # (the fixture of all tests turns it on, and back)
    timed: list[Choice] = []
    measured = trial.measured
    monkeypatch.setattr(trial, "measured", lambda problem, torchs: timed.append(measured(problem, torchs)) or
                        Choice(frozenset({"forward", "backward"}), timed[-1].words))  # fmt: skip
    calls: list[str] = []
    forward = library.forward
    monkeypatch.setattr(library, "forward", lambda *args: calls.append("forward") or forward(*args))
    torch._dynamo.reset()
    fused = torch.compile(attend, backend=Backend(strict=True), fullgraph=True, dynamic=True)
    inputs = [drawn(heads, 512, 128).detach().requires_grad_() for heads in (8, 2, 2)]
    arriving = torch.randn_like(inputs[0])
    for step in range(4):
        before = len(calls)
        ours, eager = ([out.detach(), *torch.autograd.grad(out, inputs, arriving)] for out in (f(*inputs) for f in (fused, attend)))
        exact = [t.detach().double().requires_grad_() for t in inputs]
        out = attend(*exact)
        truth = [out.detach(), *torch.autograd.grad(out, exact, arriving.double())]
        for a, b, t in zip(ours, eager, truth, strict=True):
            assert error_ratio(a, b, t) <= LIMITS[a.dtype]
        assert (len(calls) > before) == (step >= 2)
        layouts.after_step()
    assert len(timed) == 1
    assert "torch" in timed[0].words
