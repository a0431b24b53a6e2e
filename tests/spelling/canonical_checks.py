"""What the tests of canonicalization share: the same values and the same gradients, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from fxfuse.canonical import canonicalize


def capture(function: Callable[..., Any], *inputs: Any, dynamic: bool | None = None,
            **keywords: Any) -> list[tuple[fx.GraphModule, list[Any]]]:
    """The graphs that Dynamo hands to a backend, each with its inputs."""
    graphs: list[tuple[fx.GraphModule, list[Any]]] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graphs.append((gm, example_inputs))
        return fx.GraphModule(gm, copied(gm)).forward

    torch.compile(function, backend=backend, dynamic=dynamic)(*inputs, **keywords)
    return graphs


def copied(gm: fx.GraphModule) -> fx.Graph:
    """A copy of the graph, for running the original later."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return graph


def run(gm: fx.GraphModule, inputs: Sequence[Any]) -> list[Tensor | None]:
    """Outputs and the gradients of all that requires one, under random cotangents that depend on shapes alone."""
    inputs = [x.node.hint if isinstance(x, torch.SymInt) else x for x in inputs]
    inputs = [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in inputs]
    torch.manual_seed(0)
    results = [out for out in tree_leaves(gm(*inputs)) if isinstance(out, Tensor)]
    differentiable = [out for out in results if out.requires_grad]
    wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    torch.manual_seed(1)
    cotangents = [torch.randn_like(out) for out in differentiable]
    gradients = torch.autograd.grad(differentiable, wanted, cotangents, allow_unused=True) if differentiable and wanted else ()
    return [*results, *gradients]


def assert_canonicalization_changes_nothing(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    expected = run(gm, inputs)
    canonicalize(gm)
    for got, wanted in zip(run(gm, inputs), expected, strict=True):
        if wanted is None:
            assert got is None or not got.any()
        else:
            assert got is not None
            assert got.dtype == wanted.dtype
            torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
    return gm


def targets(gm: fx.GraphModule) -> list[str]:
    """The operations of a graph, in order, as ``mul.Tensor`` or the bare name of what is not canonical."""
    return [_name(node) for node in gm.graph.nodes if node.op.startswith("call_")]


def _name(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return node.target
    return str(node.target).removeprefix("aten.") if isinstance(node.target, torch._ops.OpOverload) else node.target.__name__
