"""The row program of a plain function, with its arguments named as the function's parameters are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from .program import Node, Program
from .regions.trace import trace_region


def pattern_program(function: Callable[..., Any], operands: Mapping[str, Tensor], keywords: Mapping[str, Any]) -> Program:
    """The program of ``function(*operands, **keywords)``; its arguments bear the names of the operands.

    What is computed outside of the row program is an argument too, under the name of its node.
    """
    gm, region = trace_region(function, *operands.values(), **keywords)
    inputs = dict(zip(gm.graph.find_nodes(op="placeholder"), operands, strict=True))
    views = zip(region.program.arguments, region.arguments, strict=True)
    return renamed(region.program, {a.name: inputs.get(view.node, view.node.name) for a, view in views})


def renamed(program: Program, names: Mapping[str, str]) -> Program:
    """The same program with other names for its arguments."""

    def load(node: Node) -> Node:
        return replace(node, attributes=(names[node.attributes[0]], *node.attributes[1:])) if node.op == "load" else node

    return replace(
        program,
        arguments=tuple(replace(a, name=names[a.name]) for a in program.arguments),
        nodes=tuple(load(node) for node in program.nodes),
    )
