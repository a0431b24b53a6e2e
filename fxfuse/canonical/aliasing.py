"""Which nodes share memory, and which nodes write into memory that others read."""

from __future__ import annotations

import inspect
import operator
from functools import cache
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from .._torch import OpOverload
from .facts import tensor_of

_WRITING_OPERATORS = frozenset(
    getattr(operator, name)
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "ilshift", "irshift")
) | {operator.setitem}  # fmt: skip


def storage_of(node: Any) -> int | None:
    """An identity of the memory under a node: two nodes with the same one are views of each other."""
    tensor = tensor_of(node)
    return None if tensor is None else _storage(tensor)


def _storage(tensor: Tensor) -> int | None:
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:  # a tensor without storage, such as a sparse one
        return None


def written_by(node: Node) -> list[Node]:
    """The operands that a node writes into."""
    if not node.op.startswith("call_") or node.op == "call_module":
        return []
    if isinstance(node.target, OpOverload):
        arguments = zip(node.target._schema.arguments, node.args, strict=False)
        written = [arg for declared, arg in arguments if declared.alias_info is not None and declared.alias_info.is_write]
    else:
        written = [node.args[0]] if node.args and writes_first_operand(node) else []
    return [arg for arg in (*written, node.kwargs.get("out")) if isinstance(arg, Node)]


def writes_first_operand(node: Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place_name = name.endswith("_") and not name.endswith("__")
    return in_place_name or node.target in _WRITING_OPERATORS or asks_in_place(node)


def asks_in_place(node: Node) -> bool:
    """``F.silu(x, inplace=True)`` and its kin, by keyword or by place."""
    if node.op != "call_function":
        return False
    at = place_of_inplace(node.target)
    by_place = at is not None and len(node.args) > at and node.args[at] is True
    return by_place or node.kwargs.get("inplace") is True


@cache
def place_of_inplace(function: Any) -> int | None:
    """Which argument of a function of torch.nn.functional is ``inplace``."""
    if getattr(function, "__module__", None) != "torch.nn.functional" or not inspect.isfunction(function):
        return None
    names = list(inspect.signature(function).parameters)
    return names.index("inplace") if "inplace" in names else None


def written_storages(gm: GraphModule) -> frozenset[int | None]:
    """The memory that some node writes into. What reads it must keep its place in the graph."""
    return frozenset(storage_of(operand) for node in gm.graph.nodes for operand in written_by(node))
