"""The row program of a pattern. Its function is run once on proxies: patterns are straight lines, so nothing heavier is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from ._torch import FakeTensorMode
from .canonical import canonicalize
from .program import Node, Program
from .regions.trace import whole_region


def pattern_program(function: Callable[..., Any], operands: Mapping[str, Tensor], keywords: Mapping[str, Any]) -> Program:
    """The program of ``function(*operands, **keywords)``; its arguments bear the names of the operands."""
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    proxies = [fx.Proxy(graph.placeholder(name), tracer) for name in operands]
    result = function(*proxies, **keywords)
    graph.output(fx.node.map_aggregate(result, lambda r: r.node if isinstance(r, fx.Proxy) else r))
    gm = fx.GraphModule({}, graph)
    FakeTensorProp(gm, FakeTensorMode()).propagate(*operands.values())
    region = whole_region(canonicalize(gm))
    names = {a.name: view.node.name for a, view in zip(region.program.arguments, region.arguments, strict=True)}
    return renamed(region.program, names)


def renamed(program: Program, names: Mapping[str, str]) -> Program:
    """The same program with other names for its arguments."""

    def load(node: Node) -> Node:
        return replace(node, attributes=(names[node.attributes[0]], *node.attributes[1:])) if node.op == "load" else node

    return replace(
        program,
        arguments=tuple(replace(a, name=names[a.name]) for a in program.arguments),
        nodes=tuple(load(node) for node in program.nodes),
    )
