"""Slices that take a tensor apart completely go back to being one split, whose gradient is one concatenation."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from fxfuse._torch import FakeTensorMode
from fxfuse.canonical.splits import restore_splits

aten = torch.ops.aten


def sliced(bounds, step=1):
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = FakeTensorMode().from_tensor(torch.randn(3, 12))
    slices = []
    for start, end in bounds:
        node = graph.call_function(aten.slice.Tensor, (x, -1, start, end, step))
        node.meta["example_value"] = aten.slice.Tensor(x.meta["example_value"], -1, start, end, step)
        slices.append(node)
    graph.output(tuple(slices))
    return fx.GraphModule({}, graph)


def split_sizes(gm):
    return [node.args[1] for node in gm.graph.find_nodes(op="call_function", target=aten.split_with_sizes.default)]


@pytest.mark.parametrize("bounds", [[(0, 4), (4, 12)], [(4, 2**63 - 1), (0, 4)], [(0, 2), (2, 4), (4, -1), (-1, 12), (2, 4)]])
def test_slices_that_cover_a_tensor_become_a_split(bounds):
    gm, x = sliced(bounds), torch.randn(3, 12, requires_grad=True)
    before = gm(x)
    restore_splits(gm)
    gm.recompile()
    gm.graph.lint()
    after = gm(x)
    assert len(split_sizes(gm)) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    gradients = [torch.autograd.grad(sum(i * t.sum() for i, t in enumerate(out, 1)), x) for out in (before, after)]
    assert torch.equal(*(g[0] for g in gradients))


@pytest.mark.parametrize(
    ("bounds", "step"),
    [([(0, 4), (5, 12)], 1), ([(0, 6), (4, 12)], 1), ([(0, 4)], 1), ([(0, 12)], 1), ([(0, 4), (4, 12)], 2)],
    ids=["gap", "overlap", "part", "whole", "strided"],
)
def test_other_slices_are_left_alone(bounds, step):
    gm = sliced(bounds, step)
    restore_splits(gm)
    assert split_sizes(gm) == []


def test_slices_that_are_written_are_left_alone():
    gm = sliced([(0, 4), (4, 12)])
    first = gm.graph.find_nodes(op="call_function", target=aten.slice.Tensor)[0]
    with gm.graph.inserting_after(first):
        gm.graph.call_method("zero_", (first,))
    restore_splits(gm)
    assert split_sizes(gm) == []
