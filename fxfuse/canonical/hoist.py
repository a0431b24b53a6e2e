"""Views of the rows move above the pointwise chains that they follow.

    linear -> float -> softcap -> view(-1, V) -> loss      becomes      linear -> view(-1, V) -> float -> softcap -> loss

so that a row program that ends in a reduction is not cut by a view. What comes from one tensor alone counts as a chain, however
often it reads it (``x / (1 + |x|)``). Only a chain that starts at something no row program computes (a matrix product, an input)
is moved; and a value of the chain that others read is given back to them by the inverse view, which costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from .aliasing import storage_of, written_storages
from .builder import Builder, Leave, stands_for
from .facts import (
    known_shape,
    known_tensor,
    provenance,
    record,
    same_shape,
    same_size,
    same_strides,
    tensor_of,
    value_of,
)
from .vocabulary import ASSEMBLIES, CAST, MACROS, POINTWISE, REDUCTIONS, VIEWS, aten

_MODES = frozenset([torch._C._set_grad_enabled, torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast])
_MAPS = POINTWISE | {CAST, aten.softmax.int, aten.log_softmax.int}  # of rows; views of rows commute with them
_ROW_PROGRAM = POINTWISE | REDUCTIONS | MACROS | ASSEMBLIES | {CAST}


@dataclass(frozen=True)
class Chain:
    """A row view, the nodes before it, pointwise or a softmax of each row (nearest first), and the one tensor they are made from."""

    view: Node
    maps: tuple[Node, ...]
    start: Node


def hoist_row_views(gm: GraphModule) -> None:
    written = written_storages(gm)
    builder = Builder(gm)
    for node in list(gm.graph.nodes):
        chain = chain_before(node) if is_row_view(node) else None
        if chain is None or not _may_move(chain, written):
            continue
        builder.at(node)
        try:
            _move(builder, chain)
        except Leave:
            builder.discard()


def is_row_view(node: Node) -> bool:
    """A view that leaves the last dimension as it is."""
    if tensor_of(node) is None:
        return False
    if node.target is aten.reshape.default:
        before, after = known_shape(node.args[0]), known_shape(node)
        return bool(before) and bool(after) and same_size(before[-1], after[-1])
    return node.target in (aten.slice.Tensor, aten.select.int, aten.unsqueeze.default, aten.squeeze.dim) and node.args[1] < -1


def chain_before(view: Node, ends: Callable[[Node], bool] = lambda node: False) -> Chain | None:
    """The chain that a view follows; ``ends``: a node that it starts from, whatever it computes."""
    maps: set[Node] = set()
    start: Node | None = None
    pending = [view.args[0]]
    while pending:
        node = pending.pop()
        if node in maps:
            continue
        if _is_map(node) and not ends(node):
            maps.add(node)
            pending += node.all_input_nodes
        elif start is None or start is node:
            start = node
        else:
            return None
    if start is None or not all(same_shape(node, start) for node in maps):
        return None
    return Chain(view, tuple(sorted(maps, reverse=True)), start) if maps else None


def _is_map(node: Any) -> bool:
    return node.target in _MAPS and len(node.all_input_nodes) > 0


def _may_move(chain: Chain, written: frozenset[int | None]) -> bool:
    base = chain.start
    while base.target in VIEWS:
        base = base.args[0]
    if base.target in _ROW_PROGRAM or any(storage_of(x) in written for x in (chain.start, *chain.maps)):
        return False
    node = chain.maps[-1]
    while node is not chain.view:
        if node.target in _MODES:
            return False
        node = node.next
    return all(_others_can_wait(x, chain) for x in chain.maps)


def others_of(x: Node, chain: Chain) -> list[Node]:
    return [user for user in x.users if user is not chain.view and user not in chain.maps]


def _others_can_wait(x: Node, chain: Chain) -> bool:
    """A value of the chain is computed anew where the view stands: who else reads it must come later, and read a reshape."""
    others = others_of(x, chain)
    if not others:
        return True
    contiguous = known_tensor(x).new_empty(known_shape(x))
    return (
        chain.view.target is aten.reshape.default
        and same_strides(known_tensor(x), contiguous)
        and all(chain.view < user for user in others)
    )


def replay(b: Builder, chain: Chain) -> dict[Node, Node]:
    """The chain on the view of what it starts from: its nodes, first to last, and what stands for each there."""
    moved = {chain.start: b.call(chain.view.target, chain.start, *chain.view.args[1:])}
    for old in reversed(chain.maps):
        args, kwargs = map_arg((old.args, old.kwargs), moved.__getitem__)
        new = moved[old] = b.call(old.target, *args, **kwargs)
        value = value_of(new)
        new.meta = provenance(old)
        record(new, value, like=old)
    del moved[chain.start]
    if not stands_for(moved[chain.maps[0]], chain.view):
        raise Leave("the view of the chain is not the chain of the view")
    return moved


def _move(b: Builder, chain: Chain) -> None:
    view = chain.view
    moved = replay(b, chain)
    back = {old: b.call(aten.reshape.default, new, b.sizes(known_shape(old), chain.start))
            for old, new in moved.items() if others_of(old, chain)}  # fmt: skip
    for old, again in back.items():
        for user in others_of(old, chain):
            user.replace_input_with(old, again)
    view.replace_all_uses_with(moved[chain.maps[0]])
    for dead in (view, *chain.maps):
        dead.graph.erase_node(dead)
