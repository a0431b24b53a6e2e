"""Symbolic numbers of a graph: sizes are read off the graph's inputs, floats become the numbers they are.

Three passes. A size that is read off an intermediate tensor keeps that tensor alive; the same size can be read off an input.
A float that Dynamo left symbolic (an epsilon, a scale) is a constant of the model, and so is a width: they are fixed, with
the guard that this takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node, map_arg

from .facts import same_size, static_size, tensor_of, value_of

_SIZE = torch.ops.aten.sym_size.int


def settle_floats(gm: GraphModule) -> None:
    """Replace symbolic floats by their values, in place."""
    for node in list(gm.graph.nodes):
        value = value_of(node)
        if isinstance(value, torch.SymFloat):
            _replace(gm.graph, node, float(value))


def settle_widths(gm: GraphModule) -> None:
    """Fix those symbolic last dimensions of inputs that the graph computes with, in place.

    A head size that is read off a rotary table is a width of the model, though it arrives as the size of an input; columns can only
    be cut at numbers. Masks, whose last dimension is a length, have four dimensions and are not looked at.
    """
    tensors = [tensor_of(source) for source in gm.graph.find_nodes(op="placeholder")]
    widths = [t.shape[-1] for t in tensors if t is not None and t.is_floating_point() and t.dim() == 3]
    numbers = [node for node in gm.graph.nodes if isinstance(value_of(node), torch.SymInt) and node.users]
    computed = set().union(*(_symbols(value_of(node)) for node in numbers), *map(_cut_symbols, gm.graph.nodes))
    for width in widths:
        if _symbols(width) & computed:
            int(width)  # the guard
    for node in numbers:
        number = static_size(value_of(node))
        if number is not None:
            _replace(gm.graph, node, number)


def _cut_symbols(node: Node) -> set[Any]:
    """The symbols in a last dimension that is computed from another: half of it, the rest of it, twice it."""
    value = value_of(node)
    found: set[Any] = set()
    for tensor in value if isinstance(value, (tuple, list)) else (value,):
        size = tensor.shape[-1] if isinstance(tensor, torch.Tensor) and tensor.dim() else 0
        if isinstance(size, torch.SymInt) and not size.node.expr.is_Symbol:
            found |= _symbols(size)
    return found


def _symbols(size: Any) -> set[Any]:
    return set(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else set()


def settle_sizes(gm: GraphModule) -> None:
    """Read symbolic sizes off the graph's inputs, in place."""
    for node in gm.graph.find_nodes(op="call_function", target=_SIZE):
        value = value_of(node)
        if isinstance(value, torch.SymInt):
            _read_off_input(gm.graph, node, value)


def _replace(graph: Graph, node: Node, number: Any) -> None:
    for user in list(node.users):
        user.args = map_arg(user.args, lambda arg: number if arg is node else arg)
        user.kwargs = map_arg(user.kwargs, lambda arg: number if arg is node else arg)
    if node.op != "placeholder":
        graph.erase_node(node)


def _read_off_input(graph: Graph, node: Node, size: torch.SymInt) -> None:
    for source in graph.find_nodes(op="placeholder"):
        value = value_of(source)
        if isinstance(value, torch.SymInt) and same_size(value, size):
            node.replace_all_uses_with(source)
            graph.erase_node(node)
            return
        tensor = tensor_of(source)
        for i, own in enumerate(tensor.shape if tensor is not None else ()):
            if isinstance(own, torch.SymInt) and same_size(own, size):
                node.args = (source, i)
                return
