"""The copy of a graph that runs: the same values, with torch's own functions, and each view once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fxfuse.direct_calls import METHODS, with_direct_calls
from fxfuse.row_selection.op import spread_rows


def computed(x: Tensor, w: Tensor, source: Tensor) -> Tensor:
    a = torch.ops.aten.mm.default(x.view(-1, 4), w.t())
    b = x.view(-1, 4) * 2
    return torch.cat([a, b], 1) + torch.cat([b, a], 1), spread_rows(b, source, source, 1).unsqueeze(0).permute(0, 2, 1)


def test_values_are_the_same_and_operators_are_gone() -> None:
    inputs = torch.randn(2, 3, 4), torch.randn(4, 4), torch.randperm(6)
    gm = make_fx(computed, tracing_mode="fake")(*inputs)
    direct = with_direct_calls(gm)
    for a, b in zip(direct(*inputs), gm(*inputs), strict=True):
        assert torch.equal(a, b)
    words = [node for node in direct.graph.nodes if "OpOverload" in type(node.target).__name__]
    assert words == []
    assert sum(node.target == "view" for node in direct.graph.nodes) == 1
    assert any(node.target in METHODS for node in gm.graph.nodes)


def test_what_is_written_in_place_is_written_once() -> None:
    """Two views that are equal, with a write between them, show the same memory."""

    def written(x: Tensor) -> Tensor:
        y = x.clone()
        first = y.view(-1)
        y.mul_(2)
        return first + y.view(-1)

    x = torch.randn(2, 3)
    direct = with_direct_calls(make_fx(written, tracing_mode="fake")(x))
    assert torch.equal(direct(x), written(x))
