"""What plain operations make of stand-ins is torch's word: shapes, strides, types, memory, whatever lies behind them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fxfuse.capture import plain_operations, sizes_once
from tests.swapped_settings import settings

aten = torch.ops.aten


def imagined(mode: FakeTensorMode, tensor: Tensor, symbols: str) -> Tensor:
    """A stand-in, the sizes at these places symbols."""
    dims = [DimDynamic.DYNAMIC if str(dim) in symbols else DimDynamic.STATIC for dim in range(tensor.dim())]
    return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=dims))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {  # of [batch, length, heads, head]
    "in order": lambda x: x,
    "heads before rows": lambda x: x.transpose(1, 2),
    "half of each head": lambda x: x[..., 2:],
    "half, heads before rows": lambda x: x.transpose(1, 2)[..., :2],
    "rows last": lambda x: x.permute(2, 3, 0, 1),
    "every other row": lambda x: x[:, ::2],
    "the same rows": lambda x: x[:, :1].expand(x.shape),
    "one dimension": lambda x: x.reshape(-1),
    "size one": lambda x: x[:, :, :1],
    "one more": lambda x: x[:, None],
    "later rows": lambda x: x[1:],
    "a number": lambda x: x[0, 0, 0, 0],
}
OF_ONE: dict[str, Callable[[Tensor], Tensor]] = {
    "neg": lambda x: -x, "silu": aten.silu.default, "pow": lambda x: x.pow(2), "root": lambda x: x.pow(0.5),
    "rsqrt": torch.rsqrt, "times a number": lambda x: x * 2, "plus a number": lambda x: x + 1e-6,
    "plus more": lambda x: x.add(1, alpha=2),
    "half precision": lambda x: x.to(torch.bfloat16), "double": lambda x: x.double(), "whole numbers": lambda x: x.long(),
    "times of whole numbers": lambda x: x.long() * 2, "copy": lambda x: x.clone(), "copy in order": lambda x: x.contiguous(),
    "clone in order": lambda x: x.clone(memory_format=torch.contiguous_format), "of truths": lambda x: -(x > 0).float(),
    "mean": lambda x: x.mean(-1, keepdim=True), "mean, less": lambda x: x.mean(-1),
    "mean of two": lambda x: x.mean((0, -1), keepdim=True), "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "softmax, widened": lambda x: x.softmax(-1, dtype=torch.float64), "times itself": lambda x: x * x,
    "times itself in half": lambda x: x * x.to(torch.bfloat16),
    "over itself": lambda x: x.to(torch.bfloat16) / x, "times its mean": lambda x: x * x.mean(-1, keepdim=True),
    "mean times it": lambda x: x.mean(-1, keepdim=True) * x,
    "of the square": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1),
    "slice": lambda x: x[..., 1:], "slice from the end": lambda x: x[..., -2:], "slice, empty": lambda x: x[..., 5:],
    "slice of all": lambda x: aten.slice.Tensor(x, 0, 0, 2**63 - 1), "slice of rows": lambda x: aten.slice.Tensor(x, 0, 1, 3),
    "unsqueeze": lambda x: x.unsqueeze(1), "unsqueeze at the end": lambda x: x.unsqueeze(-1), "transpose": lambda x: x.transpose(0, -1),
    "t": lambda x: x.t(), "turned": lambda x: aten.view.default(x, [-1]).unsqueeze(0).t(),
    "flat": lambda x: aten.view.default(x, [-1]), "rows": lambda x: aten.view.default(x, [-1, x.shape[-1]]),
    "heads folded": lambda x: aten._unsafe_view.default(x, [x.shape[0], x.shape[1], -1]),
    "split": lambda x: aten.view.default(x, [*x.shape[:-1], -1, 2]), "as it is": lambda x: aten.view.default(x, x.shape),
    "two of three": lambda x: aten.view.default(x, [x.shape[0] * x.shape[1], *x.shape[2:]]),
    "too many": lambda x: aten.view.default(x, [*x.shape, 3]),
    "not to be split": lambda x: aten.view.default(x, [*x.shape[:-1], -1, 3]),
}  # fmt: skip
OF_TWO: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mul": torch.mul, "the other first": lambda x, y: y * x, "add": torch.add, "add of half": lambda x, y: x + y.to(torch.bfloat16),
    "sub": lambda x, y: torch.sub(y, x, alpha=2), "by rows": lambda x, y: x * y[:, :, :1], "by heads": lambda x, y: y[:1, :1] * x,
    "by columns": lambda x, y: x * y[0, 0, 0], "columns first": lambda x, y: y[0, 0, 0] * x, "by one": lambda x, y: x * y[0, 0, 0, :1],
    "by a number in memory": lambda x, y: x * y[0, 0, 0, 0],
    "turned": lambda x, y: x * y.transpose(1, 2).contiguous().transpose(1, 2),
    "both turned": lambda x, y: x.transpose(1, 2) * y.transpose(1, 2),
    "angles": lambda x, y: x.transpose(1, 2) * y[:1, :, 0].unsqueeze(1),
    "half turned": lambda x, y: -x.transpose(1, 2)[..., 2:] * y.transpose(1, 2)[..., 2:],
}  # fmt: skip


def told(result: Tensor, of: Tensor) -> tuple:
    """All that is known of a result."""
    sizes = [[str(size) for size in part] for part in (result.shape, result.stride(), [result.storage_offset()])]
    return (*sizes, result.dtype, result.device, result.is_contiguous(), type(result), torch._C._dispatch_key_set(result),
            result.untyped_storage()._cdata == of.untyped_storage()._cdata, str(result.untyped_storage().nbytes()))


def asked(ask: Callable[[FakeTensorMode], tuple[Callable[[], Tensor], Tensor]], given: tuple = ()) -> tuple[Any, list[str]]:
    """What is told of a result, or the kind of the error; and the guards."""
    with settings(*sizes_once.SETTINGS, *given):
        mode = FakeTensorMode(shape_env=ShapeEnv())
        compute, of = ask(mode)
        before = len(mode.shape_env.guards)
        with mode:
            try:
                found: Any = told(compute(), of)
            except Exception as error:
                found = type(error)
        return found, [str(guard.expr) for guard in mode.shape_env.guards[before:]]


def check(ask: Callable[[FakeTensorMode], tuple[Callable[[], Tensor], Tensor]]) -> None:
    wanted, guards = asked(ask)
    found, ours = asked(ask, plain_operations.SETTINGS)
    assert found == wanted
    assert ours == guards


@pytest.mark.parametrize("symbols", ["01", "1"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OF_ONE)
def test_of_one_tensor(name: str, layout: str, symbols: str) -> None:
    def ask(mode: FakeTensorMode) -> tuple[Callable[[], Tensor], Tensor]:
        with mode:
            x = LAYOUTS[layout](imagined(mode, torch.randn(3, 10, 6, 4), symbols))
        return lambda: OF_ONE[name](x), x

    check(ask)


@pytest.mark.parametrize("symbols", ["01", "1", ""])
@pytest.mark.parametrize("name", OF_TWO)
def test_of_two_tensors(name: str, symbols: str) -> None:
    def ask(mode: FakeTensorMode) -> tuple[Callable[[], Tensor], Tensor]:
        x, y = (imagined(mode, torch.randn(3, 10, 6, 4), symbols) for _ in range(2))
        if symbols:
            assert all(int(size) for size in x.shape)
            assert bool(x.shape[1] == y.shape[1])
            assert bool(x.shape[0] == y.shape[0])
        return lambda: OF_TWO[name](x, y), x

    check(ask)


def test_plain_operations_are_told() -> None:
    """That of a block's usual operations none is left to torch."""
    left: list[Any] = []
    of_torch = plain_operations._of_torch

    def noted(self: Any, func: Any, *given: Any) -> Any:
        left.append(func)
        return of_torch(self, func, *given)

    with settings(*sizes_once.SETTINGS, *plain_operations.SETTINGS, (plain_operations, "_of_torch", noted)):
        mode = FakeTensorMode(shape_env=ShapeEnv())
        x = imagined(mode, torch.randn(3, 10, 24), "01")
        with mode:
            h = x.to(torch.bfloat16).float()
            h = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).view(-1, 24)
            h = h.view(x.shape[0], x.shape[1], 4, 6).transpose(1, 2)
            -h[..., 3:] * h[..., :3]
    assert left == []


def test_a_tracer_sees_what_it_saw() -> None:
    def block(x: Tensor) -> Tensor:
        return (x.view(x.shape[0] * x.shape[1], -1).t() * 2).to(torch.bfloat16).clone()

    codes = []
    for given in ((), plain_operations.SETTINGS):
        with settings(*given):
            codes.append(make_fx(block, tracing_mode="symbolic")(torch.randn(3, 10, 24)).code)
    assert codes[0] == codes[1]
