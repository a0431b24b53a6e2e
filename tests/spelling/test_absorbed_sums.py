"""Sums that a fused op of the backward takes in: which, and that gradients stay the same bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxfuse.aot as aot
from fxfuse.memory.absorb import with_sum
from fxfuse.program import parse
from fxfuse.reference import execute
from fxfuse.reporting.records import GraphRecord
from tests.adapted_modules import compiled

WIDTH = 64


class Block(nn.Module):
    """A norm and what goes past it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x))


class Twice(Block):
    """The norm's gradient is read elsewhere too: it has to be there on its own."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.tanh() * 2
        return y.sin() + self.linear(self.norm(y))


def gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    module.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    y = compiled(module)(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize(("make", "dtype"), [(Block, torch.bfloat16), (Block, torch.float32), (Block, torch.float64),
                                             (Twice, torch.bfloat16), (Twice, torch.float32)])  # fmt: skip
def test_the_same_bits(make: Callable[[], nn.Module], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch,
                       records: list[GraphRecord]) -> None:  # fmt: skip
    torch.manual_seed(0)
    module, x = make().to(dtype), torch.randn(2, 9, WIDTH).to(dtype)
    ours = gradients(module, x)
    assert "aten.add." not in records[-1].backward_source
    monkeypatch.setattr(aot, "absorb_sums", lambda gm: 0)
    torch._dynamo.reset()
    apart = gradients(module, x)
    if make is Block:
        assert "aten.add." in records[-1].backward_source
    assert all(torch.equal(a, b) for a, b in zip(ours, apart, strict=True))


PROGRAM = """program rank=1 math=float32
axis a = ?
arg x : bfloat16[r|a]
%0 = load x a 0 1
%1 = square %0
%2 = sum a %1
out y : bfloat16[r|a] = %1 @ a 0 1
out s : bfloat16[r|] = %2
"""


def test_the_program() -> None:
    program = with_sum(parse(PROGRAM), 0)
    assert program is not None
    x, added = torch.randn(5, 8).bfloat16(), torch.randn(5, 8).bfloat16()
    y, s = execute(program, [x, added])
    plain, same = execute(parse(PROGRAM), [x])
    assert torch.equal(y, plain + added)
    assert torch.equal(s, same)
    again = with_sum(program, 0)
    assert again is not None
    assert torch.equal(execute(again, [x, added, x])[0], plain + added + x)


def test_sums_over_rows_take_nothing() -> None:
    text = PROGRAM.replace("out s : bfloat16[r|] = %2", "out d : bfloat16[1|a] = %0 @ a 0 1")
    assert with_sum(parse(text), 1) is None
