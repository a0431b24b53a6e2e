"""Two launches of one program as one kernel: the same results as two, for queries and keys of different sizes."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

from fxfuse import reference
from fxfuse.fused_op import rows
from fxfuse.kernels.catalogue import contiguous_schedule
from fxfuse.kernels.launch import prepare
from fxfuse.kernels.pair import PreparedPair, emit_pair
from fxfuse.pairing import pair_launches
from tests import kernel_programs as programs


def heads(count: int, program, seed: int) -> list[torch.Tensor]:
    """Arguments of a rotation: [2, count, 3, width] as the projection leaves them, transposed; tables without heads."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for argument in program.arguments:
        width = argument.columns if isinstance(argument.columns, int) else 16
        if all(argument.rows):
            tensors.append(torch.randn(2, 3, count, width, generator=generator).to(torch.bfloat16).transpose(1, 2))
        elif any(argument.rows):
            shape = [n if varies else 1 for n, varies in zip((2, count, 3), argument.rows, strict=True)]
            tensors.append(torch.randn(*shape, width, generator=generator).to(getattr(torch, argument.dtype)))
        else:
            tensors.append(torch.randn(width, generator=generator).to(getattr(torch, argument.dtype)))
    return tensors


@pytest.mark.parametrize("make", [programs.rotary, programs.normed_rotary], ids=["rotary", "normed rotary"])
@pytest.mark.parametrize("counts", [(4, 2), (3, 5), (4, 4)], ids=str)
def test_a_pair_computes_what_two_launches_do(make, counts):
    program = make()
    sets = [heads(count, program, seed) for seed, count in enumerate(counts)]
    pair = PreparedPair(program)
    for results, tensors in zip(pair(*sets), sets, strict=True):
        for ours, alone, truth in zip(results, prepare(program)(tensors), reference.execute(program, tensors), strict=True):
            assert torch.equal(ours, alone)
            assert ours.stride() == truth.stride()
            torch.testing.assert_close(ours.float(), truth.float(), rtol=2**-8, atol=1e-3)
    assert [launch is not None for launch in pair.launches.values()] == [True]


@pytest.mark.parametrize("counts", [(1, 5), (5, 1), (4, 2), (2, 4)], ids=str)
@pytest.mark.parametrize("make", [programs.rotary, programs.normed_rotary], ids=["rotary", "normed rotary"])
def test_sets_that_lie_differently_have_a_function_each(make, counts):
    """One head and several; heads before positions and after."""
    program = make()
    one, two = heads(counts[0], program, 0), heads(counts[1], program, 1)
    two = [tensor.contiguous() if tensor.dim() == 4 and tensor.shape[1] == counts[1] else tensor for tensor in two]
    pair = PreparedPair(program)
    for _ in range(2):
        for results, tensors in zip(pair(one, two), (one, two), strict=True):
            for ours, alone in zip(results, prepare(program)(tensors), strict=True):
                assert torch.equal(ours, alone)
    assert [launch is not None for launch in pair.launches.values()] == [True]


def test_sums_over_rows_are_not_paired():
    case = programs.BY_NAME["rms_norm_backward"]
    program = case.program("bfloat16")
    tensors = case.inputs(program, (5,), 16, 1.0)
    pair = PreparedPair(program)
    assert all(len(results) == len(program.outputs) for results in pair(tensors, tensors))
    assert list(pair.launches.values()) == [None]


def test_the_source_says_what_it_is():
    source = emit_pair(programs.rotary(), *2 * [contiguous_schedule(programs.rotary())])
    assert "tile < first_tiles" in source
    assert source.count("@triton.jit") == 2


def rotations(chained: bool) -> tuple[fx.Graph, str]:
    """Two rotations of different tensors; chained: the second rotates what the first gave."""
    text, graph = str(programs.rotary("float32")), fx.Graph()
    x, cos, sin, y = (graph.placeholder(name) for name in ("x", "cos", "sin", "y"))
    one = graph.call_function(operator.getitem, (graph.call_function(rows, ([x, cos, sin], text)), 0))
    read_at_once = graph.call_function(torch.neg, (one,))
    between = graph.call_function(torch.mul, (y, 2.0))
    read = one if chained else between
    two = graph.call_function(operator.getitem, (graph.call_function(rows, ([read, cos, sin], text)), 0))
    graph.output((read_at_once, two))
    return graph, text


@pytest.mark.parametrize("chained", [False, True])
def test_independent_launches_of_a_graph_are_paired(chained):
    graph, _ = rotations(chained)
    program = programs.rotary("float32")
    x, cos, sin = heads(4, program, 0)
    tensors = [x.float(), cos, sin, heads(4 if chained else 2, program, 1)[0].float()]
    before = fx.GraphModule({}, graph)(*tensors)
    assert pair_launches(graph, lambda node: "cuda") == (0 if chained else 1)
    graph.lint()
    after = fx.GraphModule({}, graph)(*tensors)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
