"""float32 thin factors against bfloat16 data, without a float32 copy of the data: matmuls of bfloat16 parts.

Adapters in float32 on a bfloat16 model, outside autocast, read ``mm(float32(x), A')``: a copy of x twice its size and a float32 matmul.
A float32 number is the sum of three bfloat16 ones, and the products of those with x are exact in float32, so

    mm(float32(x), A')                      ->   x [A1; A2; A3]', accumulated in float32 and added up             (calls.mixed_product)
    bfloat16(addmm(float32(c), h, B'))      ->   addmm(c, [h1, h2, h1], [B1; B1; B2]'): rounded to bfloat16 once
    bfloat16(mm(g, A))                      ->   mm([g1, g2, g1], [A1; A1; A2])

where the result is rounded to bfloat16 anyway, two parts are enough. What comes out of the last two are sums of bfloat16 products like
any other, to be accumulated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..memory.joint import forward_nodes, is_view
from .calls import left_parts, mixed_product, right_parts
from .check import agrees
from .terms import RESHAPES, is_tensor, is_thin, made, matrix_source, size, tensor

aten = torch.ops.aten
WIDE, NARROW = torch.float32, torch.bfloat16
_VIEWS = (*RESHAPES, aten.t.default)


def widens(node: Any) -> bool:
    """Is this a float32 copy of a bfloat16 tensor."""
    return (isinstance(node, fx.Node) and node.target is aten._to_copy.default and is_tensor(node) and is_tensor(node.args[0])
            and tensor(node).dtype == WIDE and tensor(node.args[0]).dtype == NARROW)  # type: ignore[arg-type]


def widen_again(joint: fx.GraphModule, num_fwd_outputs: int) -> None:
    """Let the backward make its own float32 copies, so that not they but what they are made of is kept. In place."""
    graph = joint.graph
    forward = forward_nodes(graph, num_fwd_outputs)
    for node in [n for n in graph.nodes if n in forward and widens(n) and "recompute" not in n.meta]:
        _move_backward_readers(node, node.args[0], forward)
    graph.lint()


def _move_backward_readers(node: fx.Node, source: Any, forward: set[fx.Node]) -> None:
    """What is not forward and reads a node reads a copy of it, made from another source."""
    later = [user for user in node.users if user not in forward]
    views = [user for user in node.users if user in forward and is_view(user)]
    copy = None
    if later or any(_read_later(view, forward) for view in views):
        with node.graph.inserting_after(node):
            copy = node.graph.node_copy(node, lambda n: source if n is node.args[0] else n)
        copy.meta["recompute"] = torch.utils.checkpoint.CheckpointPolicy.MUST_RECOMPUTE
        copy.meta["partitioner_tag"] = "is_backward"
        for user in later:
            user.replace_input_with(node, copy)
        for view in views:
            _move_backward_readers(view, copy, forward)


def _read_later(node: fx.Node, forward: set[fx.Node]) -> bool:
    return any(user not in forward or (is_view(user) and _read_later(user, forward)) for user in node.users)


def split_wide_factors(graph: fx.Graph, validate: str) -> int:
    """Replace float32 products of widened data, in place; returns how many."""
    count = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or not node.users:
            continue
        split = _Split(node)
        result = split.narrowed() if _narrows(node) else split.mixed() if node.target is aten.mm.default else None
        if result is None:
            split.discard()
            continue
        verdict = agrees([node], [result], list(dict.fromkeys(split.leaves)), gradients=False, mode=validate)
        if verdict.reason:
            split.discard()
            continue
        node.replace_all_uses_with(result)
        count += 1
    if count:
        graph.eliminate_dead_code()
    return count


def _narrows(node: fx.Node) -> bool:
    return (node.target is aten._to_copy.default and is_tensor(node) and is_tensor(node.args[0])
            and tensor(node).dtype == NARROW and tensor(node.args[0]).dtype == WIDE)  # type: ignore[arg-type]


class _Split:
    """One product on its way to bfloat16 factors. ``leaves``: what it is made of."""

    def __init__(self, node: fx.Node) -> None:
        self.node, self.graph = node, node.graph
        self.fresh: list[fx.Node] = []
        self.leaves: list[fx.Node] = []

    def discard(self) -> None:
        for node in reversed(self.fresh):
            self.graph.erase_node(node)
        self.fresh.clear()

    def mixed(self) -> fx.Node | None:
        """mm of a widened factor and a thin float32 one."""
        left, right = self.node.args
        if tensor(self.node).dtype != WIDE or not self._mixes(left, right):
            return None
        with self.graph.inserting_before(self.node):
            a, b = self._narrow(left), self._narrow(right)
            if (a is None) == (b is None):
                return None
            self.leaves += [_source(left), _source(right)]
            return self._made(mixed_product, (a or left, b or right), tensor(self.node))

    def _mixes(self, left: Any, right: Any) -> bool:
        """The widened factor is wide and the other is thin."""
        rows, contraction, columns = size(left, 0), size(left, 1), size(right, 1)
        return is_thin(columns, contraction) or is_thin(rows, columns) or (
            contraction is None and (is_thin(columns, rows) or is_thin(rows, columns)))

    def narrowed(self) -> fx.Node | None:
        """bfloat16(...) of a float32 copy, which is what was copied; or of a product of thin factors, perhaps added to such a copy."""
        with self.graph.inserting_before(self.node):
            exact = self._narrow(self.node.args[0])
            if exact is not None:
                self.leaves.append(_source(exact))
                return exact
            return self._rounded(self.node.args[0])  # type: ignore[arg-type]

    def _rounded(self, node: fx.Node) -> fx.Node | None:
        """The bfloat16 form of a float32 node, its products taken of parts."""
        value = tensor(node).to(NARROW)
        if node.target in RESHAPES and len(node.users) == 1:
            inner = self._rounded(node.args[0])  # type: ignore[arg-type]
            return None if inner is None else self._made(node.target, (inner, *node.args[1:]), value)
        if len(node.users) != 1:
            return None
        if node.target is aten.mm.default and is_thin(size(node.args[0], 1), size(node.args[1], 1)):  # type: ignore[arg-type]
            return self._made(aten.mm.default, self._parts(*node.args), value)  # type: ignore[arg-type]
        if node.target is aten.addmm.default and is_thin(size(node.args[1], 1), size(node.args[2], 1)):  # type: ignore[arg-type]
            base: Any = node.args[0]
            inner = self._narrow(base) if self._narrow(base) is not None else self._rounded(base)
            if inner is None or tensor(base).dim() != 2:
                return None
            if _source(base) not in self.leaves and widens_inside(base):
                self.leaves.append(_source(base))
            result = self._made(aten.addmm.default, (inner, *self._parts(*node.args[1:])), value)  # type: ignore[arg-type]
            result.kwargs = dict(node.kwargs)
            return result
        return None

    def _parts(self, left: fx.Node, right: fx.Node) -> tuple[fx.Node, fx.Node]:
        self.leaves += [left, matrix_source(right)]
        rows, contraction = tensor(left).shape
        a = self._made(left_parts, (left,), tensor(left).new_empty((rows, 3 * contraction), dtype=NARROW))
        b = self._made(right_parts, (right,), tensor(right).new_empty((3 * contraction, tensor(right).shape[1]), dtype=NARROW))
        return a, b

    def _narrow(self, node: Any) -> fx.Node | None:
        """The bfloat16 matrix that a float32 one is a copy of, through views; None if it is no copy."""
        if widens(node):
            return node.args[0]
        if not isinstance(node, fx.Node) or node.target not in _VIEWS or not _keeps_columns(node):
            return None
        inner = self._narrow(node.args[0])
        return None if inner is None else self._made(node.target, (inner, *node.args[1:]), tensor(node).to(NARROW))

    def _made(self, target: Any, args: tuple, value: Any) -> fx.Node:
        self.fresh.append(made(target, args, value, self.node))
        return self.fresh[-1]


def _keeps_columns(node: fx.Node) -> bool:
    """Does a view leave rows as they are (or turn the matrix around)."""
    known = torch.fx.experimental.symbolic_shapes.statically_known_true
    return node.target is aten.t.default or known(tensor(node).shape[-1] == tensor(node.args[0]).shape[-1])  # type: ignore[arg-type]


def widens_inside(node: fx.Node) -> bool:
    """Is a node a float32 copy of bfloat16 data, seen through views."""
    while node.target in _VIEWS:
        node = node.args[0]  # type: ignore[assignment]
    return widens(node)


def _source(node: fx.Node) -> fx.Node:
    """What a factor is made of: the matrix before casts and transposes, and views of it."""
    while node.op == "call_function" and (node.target is aten._to_copy.default or (node.target in _VIEWS and _keeps_columns(node))):
        node = node.args[0]  # type: ignore[assignment]
    return node
