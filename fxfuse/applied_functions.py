"""Pointwise ``torch.autograd.Function``s of a graph: their two bodies in canonical words, and the forward put where the call was.

Dynamo leaves a function with a backward of its own as one node with two bodies,

    values, saved = forward(*operands)            gradients = backward(*cotangents, *saved)

one gradient for each operand. A function is read here where both bodies are pointwise over tensors of one shape, so that either can be
run on samples of any shape; written_derivatives.py says when the first may stand without the second.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .canonical import canonicalize
from .canonical.builder import Builder, Leave, stands_for
from .canonical.facts import (
    known_dtype,
    requires_grad,
    same_shape,
    same_sizes,
    tensor_of,
    value_of,
)
from .canonical.vocabulary import CAST, POINTWISE

_APPLY = "autograd_function_apply"


@dataclass(frozen=True)
class AppliedFunction:
    """A pointwise function at ``node``.

    forward:  operands -> (values, saved), canonical, with gradients switched by nobody; None for a value that nobody reads
    backward: cotangents of all values, then what was saved -> a gradient or None for each operand, canonical
    dtypes:   those of all values
    read:     which of the values are read, each by the nodes that take it out of the tuple
    """

    node: fx.Node
    forward: fx.GraphModule
    backward: fx.GraphModule
    dtypes: list[torch.dtype]
    read: dict[int, list[fx.Node]]

    @property
    def operands(self) -> list[Any]:
        return list(self.node.args[2:])

    def wanted(self) -> list[int]:
        """The operands that a gradient is asked of."""
        return [i for i, operand in enumerate(self.operands) if requires_grad(operand)]


def applied_functions(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, AppliedFunction | str]]:
    """The functions of a graph whose forward keeps the shape of its tensors, each as read or with the reason why it cannot be."""
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or getattr(node.target, "__name__", "") != _APPLY:
            continue
        forward, backward = (_body(gm, argument) for argument in node.args[:2])
        if forward is None or backward is None or not _keeps_its_shape(forward):
            continue
        if not any(inner.op in ("call_function", "call_method") and tensor_of(inner) is not None for inner in forward.graph.nodes):
            continue
        try:
            yield node, _read(node, forward, backward)
        except Leave as reason:
            yield node, str(reason)


def inline(gm: fx.GraphModule, function: AppliedFunction) -> None:
    """Put the forward's operations in the place of the call, where autograd derives them. Leave: nothing was changed."""
    builder = Builder(gm)
    builder.at(function.node)
    try:
        values = _copied(builder, function)
    except Leave:
        builder.discard()
        raise
    for index, readers in function.read.items():
        for reader in readers:
            reader.replace_all_uses_with(values[index])
            gm.graph.erase_node(reader)
    gm.graph.erase_node(function.node)
    for body in function.node.args[:2]:
        if isinstance(body, fx.Node) and not body.users:
            gm.graph.erase_node(body)
    gm.delete_all_unused_submodules()


def _copied(builder: Builder, function: AppliedFunction) -> dict[int, fx.Node]:
    """The values that are read, by nodes of the outer graph."""
    outer: dict[fx.Node, Any] = dict(zip(function.forward.graph.find_nodes(op="placeholder"), function.operands, strict=True))
    for node in function.forward.graph.nodes:
        if node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), outer.__getitem__)
            outer[node] = builder.call(node.target, *args, **kwargs)
    values, _ = result_of(function.forward)
    found = {index: outer[values[index]] for index in function.read}
    if not all(stands_for(found[i], reader) for i, readers in function.read.items() for reader in readers):
        raise Leave("its values have other dtypes or shapes outside the function than inside")
    return found


def _read(node: fx.Node, forward_body: fx.GraphModule, backward_body: fx.GraphModule) -> AppliedFunction:
    read = _readers(node)
    if any(tensor_of(value) is None for value in result_of(forward_body)[0]):
        raise Leave("a value of the function is no tensor")
    dtypes = [known_dtype(value) for value in result_of(forward_body)[0]]
    # torch 2.11 makes a value of everything that a forward computes: kept as outputs, they could not be put in other words.
    forward = _canonical(forward_body, lambda i: i in read)
    if not _is_pointwise(forward):
        raise Leave("its forward does more than pointwise operations, or one that is not known here")
    backward = _canonical(backward_body) if _keeps_its_shape(backward_body) else None
    if backward is None or not _is_pointwise(backward):
        raise Leave("it does more than pointwise operations")
    values, saved = result_of(forward)
    given, gradients = backward.graph.find_nodes(op="placeholder"), result_of(backward)
    if len(given) != len(values) + len(saved) or len(gradients) != len(node.args) - 2:
        raise Leave("it takes or gives something else than cotangents, saved tensors and gradients")
    places = {operand for inner in _computed(forward) for operand in inner.all_input_nodes if operand.op == "placeholder"}
    if any(not known_dtype(place).is_floating_point for place in places):
        raise Leave("the function reads tensors that are not of real numbers")
    if not all(same_shape(place, values[i]) for place in places for i in read):
        raise Leave("the function broadcasts one operand over another")
    constant: Any = node.kwargs.get("non_differentiable_idx") or ()
    if any(i in constant or values[i].op == "placeholder" for i in read):
        raise Leave("a value of the function is an operand itself, or marked as one without a gradient")
    return AppliedFunction(node, forward, backward, dtypes, read)


def _readers(node: fx.Node) -> dict[int, list[fx.Node]]:
    read: dict[int, list[fx.Node]] = {}
    for user in node.users:
        if user.target is not operator.getitem or not isinstance(user.args[1], int):
            raise Leave("the values of the function are read as a tuple")
        read.setdefault(user.args[1], []).append(user)
    return read


def _body(gm: fx.GraphModule, argument: Any) -> fx.GraphModule | None:
    found = getattr(gm, str(argument.target), None) if isinstance(argument, fx.Node) and argument.op == "get_attr" else None
    return found if isinstance(found, fx.GraphModule) else None


def result_of(body: fx.GraphModule) -> Any:
    """What a body returns, in nodes."""
    return body.graph.output_node().args[0]


def _canonical(body: fx.GraphModule, keep: Callable[[int], bool] | None = None) -> fx.GraphModule:
    """A copy of a body in the canonical vocabulary, without the switching of gradients around it; of a forward, with the values to
    ``keep`` alone."""
    graph = fx.Graph()
    result: Any = graph.graph_copy(body.graph, {})
    if keep is not None:
        values, saved = result
        result = (tuple(value if keep(i) else None for i, value in enumerate(values)), saved)
    graph.output(result)
    for node in list(graph.nodes):
        if node.target is torch._C._set_grad_enabled:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    return canonicalize(fx.GraphModule(body, graph))


def _keeps_its_shape(body: fx.GraphModule) -> bool:
    """Have the tensors of a body one shape? What has not is not looked at further. (A number may be a tensor of no dimensions.)"""
    tensors = [tensor for node in body.graph.nodes if (tensor := tensor_of(node)) is not None and tensor.dim()]
    return bool(tensors) and all(same_sizes(tensor.shape, tensors[0].shape) for tensor in tensors)


def _computed(body: fx.GraphModule) -> list[fx.Node]:
    return [node for node in body.graph.nodes if node.op not in ("placeholder", "output")]


def _is_pointwise(body: fx.GraphModule) -> bool:
    """Is all that a body computes pointwise in tensors and in numbers of the code."""
    words = all(node.target in POINTWISE or node.target is CAST for node in _computed(body))
    return words and not any(_is_number(operand) for node in _computed(body) for operand in node.all_input_nodes)


def _is_number(operand: fx.Node) -> bool:
    """A number that may be another one in the next call."""
    return isinstance(value_of(operand), torch.SymInt | torch.SymFloat | int | float)
