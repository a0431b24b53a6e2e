"""Regions: which operations of a canonical graph become one row program, and that the program computes them."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

from fxfuse import fused_op
from fxfuse._torch import FakeTensorMode
from fxfuse.canonical.vocabulary import CAST
from fxfuse.naming import name_of
from fxfuse.regions import find_regions
from fxfuse.regions.region import call

aten = torch.ops.aten


def graph_of(function, *inputs):
    """A canonical graph: ``function`` is written in canonical operations."""
    gm = fx.symbolic_trace(function)
    mode = FakeTensorMode()
    fakes = iter([mode.from_tensor(tensor) for tensor in inputs])
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            node.meta["example_value"] = next(fakes)
        elif node.op == "call_function":
            node.meta["example_value"] = node.target(
                *fx.map_arg(node.args, lambda a: a.meta["example_value"]), **node.kwargs
            )
    return gm


def assert_same_values(gm, regions, inputs):
    """Every region's outputs, computed through its program and its views, equal the graph's own."""
    graph = gm.graph
    end = graph.find_nodes(op="output")[0]
    pairs = []
    with graph.inserting_before(end):
        for region in regions:
            arguments = [view.insert(graph) for view in region.arguments]
            results = call(graph, region.nodes[0], fused_op.rows, arguments, str(region.program))
            named = {
                o.name: call(graph, region.nodes[0], operator.getitem, results, i)
                for i, o in enumerate(region.program.outputs)
            }
            pairs += [
                (view.node, view.insert(graph, [named[name] for name in view.names]))
                for view in region.outputs
            ]
    end.args = (tuple(pairs),)
    gm.recompile()
    for ours, theirs in gm(*inputs):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        torch.testing.assert_close(theirs, ours, rtol=1e-12, atol=1e-12)


def regions_of(function, *inputs):
    gm = graph_of(function, *inputs)
    regions, declined = find_regions(gm)
    assert not declined
    assert_same_values(gm, regions, inputs)
    return regions


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def rms_norm(x, w):
    variance = aten.mean.dim(aten.pow.Tensor_Scalar(x, 2), [-1], True)
    return aten.mul.Tensor(w, aten.mul.Tensor(x, aten.rsqrt.default(aten.add.Tensor(variance, 1e-6))))


def rotate(q, cos, sin):
    a, b = aten.slice.Tensor(q, -1, 0, 8, 1), aten.slice.Tensor(q, -1, 8, 16, 1)
    turned = aten.cat.default([aten.neg.default(b), a], -1)
    return aten.add.Tensor(aten.mul.Tensor(q, cos), aten.mul.Tensor(turned, sin))


def loss(logits, labels, reduction=1, smoothing=0.0):
    return aten.cross_entropy_loss.default(logits, labels, None, reduction, -100, smoothing)


def test_a_norm_is_one_region_of_its_input_and_its_weight():
    (region,) = regions_of(rms_norm, rand(2, 5, 16), rand(16))
    assert sorted(a.rows for a in region.program.arguments) == [(False, False), (True, True)]


def test_one_plus_a_weight_joins_the_norm_that_reads_it():
    def gemma(x, w):
        return rms_norm(x, aten.add.Tensor(w, 1.0))

    (region,) = regions_of(gemma, rand(2, 5, 16), rand(16))
    assert len(region.program.arguments) == 2


def test_residual_and_norm_are_one_region_with_both_outputs():
    def block(x, r, w):
        h = aten.add.Tensor(x, r)
        return h, rms_norm(h, w)

    (region,) = regions_of(block, rand(2, 5, 16), rand(2, 5, 16), rand(16))
    assert len(region.program.outputs) == 2


def test_norm_and_rotation_meet_across_a_transpose_and_copy_nothing():
    def qk(q, w, cos, sin):
        q = aten.permute.default(rms_norm(q, w), [0, 2, 1, 3])
        return rotate(q, aten.unsqueeze.default(cos, -3), aten.unsqueeze.default(sin, -3))

    (region,) = regions_of(qk, rand(2, 5, 4, 16), rand(16), rand(1, 5, 16), rand(1, 5, 16))
    lanes = {node.attributes[1] for node in region.program.nodes if node.op == "load"}
    assert {(lane.offset, lane.stride) for lane in lanes} == {(0, 1), (8, 1)}
    assert sum(node.op == "sum" for node in region.program.nodes) == 2  # the norm's row sum, lane by lane


def test_an_interleaved_rotation_reads_even_and_odd_lanes():
    def interleaved(q, cos, sin):
        even, odd = aten.slice.Tensor(q, -1, 0, 16, 2), aten.slice.Tensor(q, -1, 1, 16, 2)
        turned = aten.reshape.default(aten.stack.default([aten.neg.default(odd), even], -1), [2, 4, 5, 16])
        cos, sin = (aten.repeat_interleave.self_int(t, 2, -1) for t in (cos, sin))
        return aten.add.Tensor(aten.mul.Tensor(q, cos), aten.mul.Tensor(turned, sin))

    (region,) = regions_of(interleaved, rand(2, 4, 5, 16), rand(2, 1, 5, 8), rand(2, 1, 5, 8))
    assert {lane for _, lane in region.program.outputs[0].stores} == {("c0", 0, 2), ("c0", 1, 2)}


def test_a_partial_rotation_passes_the_tail_through_on_an_axis_of_its_own():
    def partial(q, cos, sin):
        head, tail = aten.slice.Tensor(q, -1, 0, 16, 1), aten.slice.Tensor(q, -1, 16, 40, 1)
        return aten.cat.default([rotate(head, cos, sin), tail], -1)

    (region,) = regions_of(partial, rand(2, 4, 5, 40), rand(2, 1, 5, 16), rand(2, 1, 5, 16))
    assert dict(region.program.axes) == {"c0": 8, "c1": 24}


def test_even_and_odd_in_halves_out():
    def deepseek(q, cos, sin):
        even, odd = aten.slice.Tensor(q, -1, 0, 16, 2), aten.slice.Tensor(q, -1, 1, 16, 2)
        first = aten.sub.Tensor(aten.mul.Tensor(even, cos), aten.mul.Tensor(odd, sin))
        second = aten.add.Tensor(aten.mul.Tensor(odd, cos), aten.mul.Tensor(even, sin))
        return aten.cat.default([first, second], -1)

    (region,) = regions_of(deepseek, rand(2, 4, 5, 16), rand(2, 1, 5, 8), rand(2, 1, 5, 8))
    assert {lane[1:] for _, lane in region.program.outputs[0].stores} == {(0, 1), (8, 1)}


def test_a_packed_gate_is_read_by_halves_of_one_argument():
    def packed(x):
        gate, up = aten.slice.Tensor(x, -1, 0, 8, 1), aten.slice.Tensor(x, -1, 8, 16, 1)
        return aten.mul.Tensor(aten.silu.default(gate), up)

    (region,) = regions_of(packed, rand(2, 5, 16))
    assert [a.columns for a in region.program.arguments] == [16]


def test_a_slice_that_leaves_columns_out_stays_outside():
    def part(x):
        gate, up = aten.slice.Tensor(x, -1, 0, 4, 1), aten.slice.Tensor(x, -1, 8, 12, 1)
        return aten.mul.Tensor(aten.silu.default(gate), up)

    (region,) = regions_of(part, rand(2, 5, 16))
    assert [a.columns for a in region.program.arguments] == ["c0", "c0"]


@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_one_loss_a_row(reduction, smoothing):
    labels = torch.tensor([3, -100, 0, 15, 7])

    def head(logits, labels):
        return loss(
            aten.mul.Tensor(aten.tanh.default(aten.div.Tensor(logits, 30.0)), 30.0),
            labels,
            reduction,
            smoothing,
        )

    (region,) = regions_of(head, rand(5, 16), labels)
    assert all(output.columns is None for output in region.program.outputs)


def test_a_row_statistic_without_its_dimension_keeps_its_rows():
    def stat(x):
        norm = aten.linalg_vector_norm.default(x, 2, [-1], False)
        return aten.mul.Tensor(x, aten.reciprocal.default(aten.unsqueeze.default(norm, -1))), norm

    (region,) = regions_of(stat, rand(2, 5, 16))
    assert len(region.outputs) == 2


def test_the_norm_of_a_zero_row_has_a_zero_gradient():
    def normalize(x):
        norm = aten.clamp.default(aten.linalg_vector_norm.default(x, 2, [-1], True), 1e-12, None)
        return aten.div.Tensor(x, norm)

    x = rand(4, 16)
    (region,) = regions_of(normalize, x)
    zeroed = x.clone()
    zeroed[1] = 0.0
    cotangent = rand(4, 16)
    fused, eager = (
        torch.autograd.functional.vjp(function, zeroed, cotangent)[1]
        for function in (
            lambda t: fused_op.rows([t], str(region.program))[0],
            lambda t: torch.nn.functional.normalize(t, dim=-1),
        )
    )
    torch.testing.assert_close(fused, eager)


def test_a_region_never_swallows_a_path_that_leaves_it():
    """x feeds a norm and, through a matmul of that norm, the residual sum: the sum cannot join the first norm."""

    def block(x, w, weight):
        normed = rms_norm(x, w)
        h = aten.add.Tensor(aten.mul.Tensor(normed, 2.0), aten.matmul.default(normed, weight))
        return rms_norm(h, w)

    regions = regions_of(block, rand(2, 5, 16), rand(16), rand(16, 16))
    assert len(regions) == 2


def test_a_smaller_computation_is_not_repeated_for_every_row():
    def tables(q, freqs):
        cos = aten.mul.Tensor(aten.cos.default(freqs), 2.0)
        return aten.add.Tensor(aten.mul.Tensor(q, aten.unsqueeze.default(cos, -3)), q)

    regions = regions_of(tables, rand(2, 4, 5, 16), rand(1, 5, 16))
    assert len(regions) == 2


def test_a_change_of_mode_ends_a_region():
    def chain(x):
        return aten.mul.Tensor(aten.exp.default(aten.mul.Tensor(aten.exp.default(x), 2.0)), 3.0)

    gm = graph_of(chain, rand(2, 16))
    assert len(find_regions(gm)[0]) == 1
    second = gm.graph.find_nodes(op="call_function", target=aten.exp.default)[1]
    with gm.graph.inserting_before(second):
        gm.graph.call_function(torch._C._set_grad_enabled, (True,))
    assert len(find_regions(gm)[0]) == 2


def test_what_cannot_be_a_row_program_is_declined_with_a_sentence():
    def norm(x):
        return aten.layer_norm.default(x, [5, 16], None, None, 1e-5)

    _, (declined,) = find_regions(graph_of(norm, rand(2, 5, 16)))
    assert "2 dimensions at once" in declined.reason


@pytest.mark.parametrize(
    "lone",
    [lambda x: aten.add.Tensor(x, x), lambda x: CAST(x, torch.float32), aten.exp.default],
    ids=["sum", "cast", "exp"],
)
def test_one_cheap_operation_is_no_region(lone):
    assert regions_of(lambda x: lone(x), rand(2, 16)) == []


def test_a_lone_sigmoid_is_an_activation():
    """As a router's scores, or a gate whose product stands in another layout."""
    (region,) = regions_of(lambda x: aten.sigmoid.default(x), rand(2, 16))
    assert name_of(region.program)[0] == "activation"


def test_clearing_whole_rows_is_a_region():
    """As experts mask the tokens that are not theirs: torch's kernel for a condition that broadcasts over columns is slow."""
    mask, both = torch.tensor([[True], [False]]), (rand(2, 16), rand(2, 16))
    (region,) = regions_of(lambda x, y, m: aten.where.self(m, x, y), *both, mask)
    assert [node.op for node in region.program.nodes].count("select") == 1
    assert regions_of(lambda x, y, m: aten.where.self(m, x, y), *both, mask.expand(2, 16).contiguous()) == []
