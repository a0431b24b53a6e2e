"""In-place operations as functional ones, where nobody could see the difference.

The written tensor must be made inside the graph, and no other name of its memory may be read afterwards. Later uses of the
old name then read the new value (``v.add_(b); f(v)`` means ``f(v + b)``). Any other in-place operation stays as it is.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .aliasing import asks_in_place, place_of_inplace, storage_of, writes_first_operand
from .builder import Builder, Leave, stands_for
from .facts import record, requires_grad, tensor_of, value_of
from .views import index_steps
from .vocabulary import aten

_OPERATORS = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ipow: operator.pow,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
}
# Tensor methods that work elementwise and give the shape of the tensor that they are called on.
_METHODS = frozenset(
    f"{name}_"
    for name in (
        "add", "sub", "mul", "div", "pow", "neg", "abs", "exp", "log", "sqrt", "rsqrt", "reciprocal", "square", "sigmoid", "tanh",
        "relu", "clamp", "clamp_min", "clamp_max", "masked_fill", "logical_not", "logical_and", "logical_or",
    )
)  # fmt: skip
_SCATTERS = {aten.slice.Tensor: aten.slice_scatter.default, aten.select.int: aten.select_scatter.default}


def functionalize(gm: GraphModule) -> None:
    """Replace what can be replaced, first to last.

    (``low += wide`` stays: its gradients are rounded before they are summed, where those of a sum and a cast are summed first.)
    """
    builder = Builder(gm)
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    aliases = _aliases(gm)
    grad_enabled = True
    for node in list(gm.graph.nodes):
        if node.target is torch._C._set_grad_enabled:
            grad_enabled = bool(node.args[0])
        if node.op not in ("call_function", "call_method") or not node.args or not writes_first_operand(node):
            continue
        written = node.args[0]
        if not isinstance(written, Node) or not (grad_enabled or not requires_grad(written)):
            continue
        if not _seen_elsewhere(written, node, aliases, order):
            _replace(builder, written, node, aliases, order)


def _aliases(gm: GraphModule) -> dict[int | None, list[Node]]:
    aliases: dict[int | None, list[Node]] = defaultdict(list)
    for node in gm.graph.nodes:
        aliases[storage_of(node)].append(node)
    return aliases


def _seen_elsewhere(written: Node, at: Node, aliases: dict[int | None, list[Node]], order: dict[Node, int]) -> bool:
    """Is the memory the caller's, or read after ``at`` through another name that was given before."""
    storage = storage_of(written)
    if storage is None:
        return True
    others = [other for other in aliases[storage] if other is not written and order[other] < order[at]]
    return any(
        other.op in ("placeholder", "get_attr") or any(order[user] > order[at] for user in other.users)
        for other in [*others, *([written] if written.op in ("placeholder", "get_attr") else [])]
    )


def _replace(
    builder: Builder, written: Node, node: Node, aliases: dict[int | None, list[Node]], order: dict[Node, int]
) -> None:
    builder.at(node)
    try:
        new = _functional(builder, written, node)
        if not stands_for(new, written):
            raise Leave("the functional form has another dtype or shape")
    except Leave:
        builder.discard()
        return
    # The new value keeps the identity of the memory that it stands for: what is a view of the one is a view of the other.
    record(new, builder.viewed(value_of(written), builder.tensor(new)), like=written)
    for inserted in builder.inserted:
        order[inserted] = order[node]
    aliases[storage_of(written)].append(new)
    for user in list(written.users):
        if order[user] > order[node]:
            user.replace_input_with(written, new)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    aliases[storage_of(written)] = [alias for alias in aliases[storage_of(written)] if alias is not node]


def _functional(b: Builder, written: Node, node: Node) -> Node:
    if node.target is operator.setitem:
        return _scattered(b, written, *node.args[1:])
    return b.like(*_functional_form(node))


def _functional_form(node: Node) -> tuple[str, Any, tuple[Any, ...], dict[str, Any]]:
    """(op, target, arguments, keywords) of the operation without its side effect."""
    kwargs = {name: value for name, value in node.kwargs.items() if name != "inplace"}
    if asks_in_place(node):
        at = place_of_inplace(node.target)
        return node.op, node.target, tuple(False if i == at else arg for i, arg in enumerate(node.args)), kwargs
    if node.target in _OPERATORS:
        return node.op, _OPERATORS[node.target], node.args, kwargs
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name in _METHODS:
        return "call_method", name[:-1], node.args, kwargs
    raise Leave("no functional form is known")


def _scattered(b: Builder, written: Node, index: Any, value: Any) -> Node:
    """``x[index] = value`` along one dimension."""
    steps = index_steps(b, written, index)
    if len(steps) != 1 or steps[0][0] not in _SCATTERS or tensor_of(value) is None:
        raise Leave("writes along several dimensions, or a number")
    cut, *place = steps[0]
    target = b.call(cut, written, *place)
    value = b.cast(value, b.tensor(written).dtype)
    value = b.call(aten.expand.default, value, b.sizes(b.tensor(target).shape, target))
    return b.call(_SCATTERS[cut], written, value, *place)
