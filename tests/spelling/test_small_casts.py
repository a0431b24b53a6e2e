"""Small casts by one launch: which are gathered, where, and that values and gradients stay the same bits."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxfuse.bufferize as bufferize
from fxfuse.reporting.records import GraphRecord
from fxfuse.small_casts import LEAST, cast_together
from tests.adapted_modules import GatedMLP, Kinds, compiled


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, where it gains nothing, too."""
    monkeypatch.setattr(bufferize, "_is_on_gpu", lambda node: True)


def step(run: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> list[Tensor]:
    module.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = run(x)
    y.sum().backward()
    return [y.detach(), *(p.grad for p in module.parameters() if p.grad is not None)]


def test_adapters_of_a_block(records: list[GraphRecord], monkeypatch: pytest.MonkeyPatch) -> None:
    module = Kinds(adapters=torch.float32, autocast=True).prepare(GatedMLP(casts=True))
    x = torch.randn(2, 30, 64, dtype=torch.bfloat16, requires_grad=True)
    together = step(compiled(module), module, x)
    forward, backward = records[-1].forward_source, records[-1].backward_source
    assert forward.count("cast_together(") == backward.count("cast_together(") == 1
    assert "aten._to_copy.default(primals" not in forward
    assert "torch.float32, layout" not in backward
    monkeypatch.setattr(bufferize, "_is_on_gpu", lambda node: False)
    torch._dynamo.reset()
    alone = step(compiled(module), module, x)
    assert "cast_together(" not in records[-1].forward_source
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_memory_is_reused_as_without_a_gpu(records: list[GraphRecord], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is put in for a GPU alone hides from the plan of reuse neither whose memory a value has nor that it is new."""
    found = []
    for on_gpu in (True, False):
        monkeypatch.setattr(bufferize, "_is_on_gpu", lambda node, on_gpu=on_gpu: on_gpu)
        torch._dynamo.reset()
        module = Kinds(adapters=torch.float32, autocast=True).prepare(GatedMLP(casts=True))
        step(compiled(module), module, torch.randn(2, 30, 64, dtype=torch.bfloat16, requires_grad=True))
        found.append(re.findall(r"fused_\w+\(\[[^\]]*\](.*)\);", records[-1].backward_source))
    assert found[0] == found[1]
    assert any("(" in reuse for reuse in found[0])


def gathered(function: Callable[..., Tensor], records: list[GraphRecord], *operands: Tensor) -> int:
    class Run(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList(operands)

        def forward(self, x: Tensor) -> Tensor:
            return function(x, *(self.weights[i] for i in range(len(operands))))

    run, x = Run(), torch.randn(5, 8)
    torch.testing.assert_close(compiled(run)(x), run(x))
    return records[-1].forward_source.count("cast_together(")


SMALL = [torch.randn(8, 8, dtype=torch.float64) for _ in range(LEAST)]


def test_a_few_are_left(records: list[GraphRecord]) -> None:
    assert gathered(lambda x, a, b, c: x @ a.float() @ b.float() @ c.float(), records, *SMALL) == 1
    assert gathered(lambda x, a, b: x @ a.float() @ b.float(), records, *SMALL[:2]) == 0


def test_large_and_transposed_ones_are_left(records: list[GraphRecord]) -> None:
    large = [torch.randn(8, 2**18 + 1, dtype=torch.float64) for _ in range(LEAST)]
    assert gathered(lambda x, *w: sum((x @ m.float()).sum() for m in w), records, *large) == 0
    assert gathered(lambda x, *w: sum((x @ m.float()).sum() for m in w), records, *(m.t() for m in SMALL)) == 0


def test_the_call() -> None:
    results = cast_together(SMALL, torch.bfloat16)
    assert all(torch.equal(r, s.bfloat16()) for r, s in zip(results, SMALL, strict=True))
    assert len({r.untyped_storage().data_ptr() for r in results}) == len(SMALL)
