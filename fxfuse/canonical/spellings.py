"""One pass over a graph that replaces each known spelling by its canonical nodes, in place and in order."""

from __future__ import annotations

import inspect
import logging
import operator
from collections.abc import Sequence
from functools import cache
from typing import Any

from torch.fx import GraphModule, Node

from .._torch import OpOverload
from . import casts, macros, pointwise, reductions, rotary, views  # noqa: F401 - each registers its readers
from .builder import Builder, Leave, stands_for
from .vocabulary import Reader, reader_of

log = logging.getLogger("fxfuse")


def read_spellings(gm: GraphModule) -> None:
    builder = Builder(gm)
    for node in list(gm.graph.nodes):
        reader = reader_of(node)
        if reader is None or node.graph is not gm.graph:
            continue
        builder.at(node)
        try:
            result = _read(reader, builder, node)
        except Leave as reason:
            log.debug("%s is left as it was: %s", node.format_node(), reason)
            builder.discard()
        else:
            _replace(node, result)


def _read(reader: Reader, builder: Builder, node: Node) -> Any:
    arguments = _bound(reader, builder, node)
    result = reader(*arguments.args, **arguments.kwargs)
    if isinstance(result, list):
        _check_parts(node, result)
    elif not stands_for(result, node):
        raise Leave("the canonical result has another dtype or shape")
    elif result.op in ("placeholder", "get_attr") and _is_output(node):
        raise Leave("an output that would become an input itself")
    return result


def _bound(reader: Reader, builder: Builder, node: Node) -> inspect.BoundArguments:
    kwargs = {name: value for name, value in node.kwargs.items() if not (name == "out" and value is None)}
    if isinstance(node.target, OpOverload) and "self" in kwargs:
        kwargs["input"] = kwargs.pop("self")
    try:
        return _signature(reader).bind(builder, *node.args, **kwargs)
    except TypeError as error:
        raise Leave(f"arguments that no reader knows: {error}") from error


@cache
def _signature(reader: Reader) -> inspect.Signature:
    return inspect.signature(reader)


def _check_parts(node: Node, parts: Sequence[Node | None]) -> None:
    for user in node.users:
        if user.target is not operator.getitem or not isinstance(user.args[1], int):
            raise Leave("the tuple is used as a whole")
        part = parts[user.args[1]]
        if not user.users:
            continue
        if part is None or not stands_for(part, user):
            raise Leave("a part has another dtype or shape")


def _replace(node: Node, result: Any) -> None:
    if isinstance(result, list):
        for user in list(node.users):
            if user.users:
                user.replace_all_uses_with(result[user.args[1]])
            user.graph.erase_node(user)
    else:
        node.replace_all_uses_with(result)
    node.graph.erase_node(node)


def _is_output(node: Node) -> bool:
    return any(user.op == "output" for user in node.users)
