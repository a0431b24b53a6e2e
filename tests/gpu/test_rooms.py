"""Frozen weights with room for their adapters on a device: gradients, other streams, and that nothing is lost."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse.capture import rooms
from fxfuse.reporting.records import GraphRecord
from fxfuse.roomy_weights import home_of, row_distance
from fxfuse.validation import error_ratio
from tests.adapted_modules import Attentionlike, GatedMLP, Kinds

WIDTH, HIDDEN, TOKENS = 2048, 4096, 1024


@pytest.fixture(autouse=True)
def moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(rooms.SETTING, "1")


def made(make: type, dtype: torch.dtype) -> nn.Module:
    return Kinds(model=dtype, adapters=dtype).prepare(make(WIDTH, HIDDEN, rank=16)).cuda()


def step(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    x = x.detach().requires_grad_()
    y = module(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.device, y.dtype))
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "x": x.grad, **grads}  # type: ignore[dict-item]


def drawn(dtype: torch.dtype) -> Tensor:
    return torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(3)).to("cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [GatedMLP, Attentionlike])
def test_every_gradient(make: type, dtype: torch.dtype, records: list[GraphRecord]) -> None:
    module, x = made(make, dtype), drawn(dtype)
    exact = copy.deepcopy(module).double()
    truth, eager = step(exact, x.double()), step(copy.deepcopy(module), x)
    fxfuse.optimize(module, strict=True, remainder="eager")
    for _ in range(2):
        ours = step(module, x)
        assert max(error_ratio(ours[name], eager[name], truth[name]) for name in truth) < 2.2
    assert records[-1].forward_source.count("'own')") == (2 if make is GatedMLP else 3)
    weight = (module.gate if make is GatedMLP else module.q).base.weight
    assert home_of(weight) is not None
    assert weight.stride(0) == row_distance(WIDTH, 32 if make is GatedMLP else 48)


def test_on_another_stream_the_weight_is_copied() -> None:
    """What lies beside it belongs to the stream that it was moved on."""
    module, x = made(GatedMLP, torch.bfloat16), drawn(torch.bfloat16)
    fxfuse.optimize(module, strict=True, remainder="eager")
    expected = {name: value.clone() for name, value in step(module, x).items()}
    weight = module.gate.base.weight
    whole = weight.data.as_strided((HIDDEN, weight.stride(0)), weight.stride())
    whole[:, WIDTH:].fill_(7.0)
    torch.cuda.synchronize()
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        found = step(module, x)
    torch.cuda.synchronize()
    assert torch.equal(whole[:, WIDTH:], torch.full_like(whole[:, WIDTH:], 7.0))
    for name in expected:
        assert error_ratio(found[name], expected[name], expected[name].double()) < 2.2, name


def test_given_back_to_the_byte() -> None:
    module, x = made(GatedMLP, torch.bfloat16), drawn(torch.bfloat16)
    values = {name: p.detach().clone() for name, p in module.named_parameters()}
    step(module, x)
    module.zero_grad()
    gc.collect()
    before = sum(p.untyped_storage().nbytes() for p in module.parameters())
    fxfuse.optimize(module, strict=True, remainder="eager")
    step(module, x)
    assert sum(p.untyped_storage().nbytes() for p in module.parameters()) > before
    fxfuse.restore(module)
    assert sum(p.untyped_storage().nbytes() for p in module.parameters()) == before
    assert all(torch.equal(p, values[name]) and p.is_contiguous() for name, p in module.named_parameters())
