"""The graph of one tile, made from a part of a graph, and the call that stands in the part's place.

The nodes are those of the part. What names a number of rows (the sizes of views) says "the rest" instead; a sum over rows is added to a
tensor that is handed in; a matmul that makes a result writes it where it is wanted.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import fx

from ... import bufferize
from ...fused_op import rows as fused_op
from ...linear_loss.products import accumulator_dtype
from ...products import calls
from ...reuse import DONATED, FREE, root_of
from ..joint import is_rows, is_view, outputs_of, program_of
from .live import PLACEABLE, Memory
from .loop import Loop, Place, add_product, add_to, product_into
from .rows import SUMMED, WHOLE, Rows, is_array, shape_of
from .segment import Segment

aten = torch.ops.aten
_SIZED = (aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default)
WIDE = list(signature(calls.thin_pair).parameters).index("wide")
_PRODUCTS = (aten.mm.default, calls.product)


class Body:
    """A part's tile. ``over``: results that may lie over operands; ``written``: those that the tile's graph writes itself."""

    def __init__(self, segment: Segment, memory: Memory) -> None:
        self.segment, self.memory = segment, memory
        self.operands, self.results = segment.operands, segment.results
        self.over, self.dying = memory.places(segment), memory.dying(segment)
        self.sums = [node for node in self.results if segment.rows[node] == SUMMED]
        self.roots = {node: root for node in self.results if node not in self.over
                      if (root := _maker(node)) in segment.inside and root.target in PLACEABLE and len(shape_of(node)) == 2
                      and segment.rows[node] == (0,)}  # fmt: skip

    def loop(self, largest: int, count: int) -> Loop:
        """What runs the part, in so many tiles of at most so many rows."""
        saved = [node for node in self.dying if root_of(node).op == "placeholder"]
        return Loop(
            rows=tuple(self.segment.rows.get(node, WHOLE) if is_array(node) else WHOLE for node in self.operands),
            places=tuple(map(self._place, self.results)),
            largest=largest,
            count=count,
            saved=tuple(map(self.operands.index, saved)),
            tile=self._compiled(in_place=False),
            tile_in_place=self._compiled(in_place=True) if self.dying else None,
        )

    def _place(self, node: fx.Node) -> Place:
        rows, shape = self.segment.rows[node], shape_of(node)
        like = self.segment.like(node) if len(rows) > 1 else None
        return Place(
            rows=() if rows == SUMMED else rows,
            sizes=tuple(int(size) for d, size in enumerate(shape) if d not in rows or rows == SUMMED),
            dtype=node.meta["val"].dtype,
            like=self.operands.index(like or self.segment.varying[0]),
            over=self.operands.index(self.over[node]) if node in self.over else None,
            written=self._is_written(node),
        )

    def _is_written(self, node: fx.Node) -> bool:
        return node in self.sums or node in self.roots

    def _compiled(self, in_place: bool) -> Callable[[list], Any]:
        graph, copies = self.copied()
        wanted = {copies[result]: copies[operand] for result, operand in self.over.items()} if in_place else {}
        for operand in self.dying if in_place else ():
            copies[operand].meta[DONATED] = FREE
        gm = fx.GraphModule(torch.nn.Module(), graph)
        bufferize.bufferize(gm, wanted)
        return bufferize.boxed(gm)

    def copied(self) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
        """A tile's graph, and what each node of the part is in it. Placeholders: the operands, then what is written; outputs: the
        results."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for i, node in enumerate(self.operands):
            copies[node] = graph.placeholder(f"operand_{i}")
            copies[node].meta = {k: v for k, v in node.meta.items() if k != DONATED}
        targets = {}
        for i, node in enumerate(self.results):
            if self._is_written(node):
                targets[node] = graph.placeholder(f"result_{i}")
                targets[node].meta["val"] = node.meta["val"]
        makers = {root: node for node, root in self.roots.items()}
        for node in self.segment.nodes:
            if node in self.segment.repeated:
                continue
            for source in self.segment.made_for(node):
                copies[source] = graph.node_copy(source, copies.__getitem__)
            if node in self.sums and node.target is not operator.getitem:
                copies[node] = self._summed(graph, node, targets[node], copies)
            elif node in makers:
                left, right, alpha = _factors(node)
                copies[node] = graph.call_function(product_into, (targets[makers[node]], copies[left], copies[right], alpha))
                copies[node].meta = dict(node.meta)
            else:
                copies[node] = self._copied(graph, node, copies)
                if node in self.sums:
                    copies[node] = graph.call_function(add_to, (targets[node], copies[node]))
        graph.output(tuple(copies[node] for node in self.results))
        graph.lint()
        return graph, copies

    def _copied(self, graph: fx.Graph, node: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> fx.Node:
        copy = graph.node_copy(node, copies.__getitem__)
        rows = self.segment.rows.get(node, WHOLE)
        if node.target in _SIZED and rows:
            copy.args = (copy.args[0], self._sizes(node, rows, copies), *copy.args[2:])
        elif is_rows(node):
            _widen_sums(node, copy, {index for index, result in outputs_of(node).items() if result in self.sums})
        elif node.target is calls.thin_pair:
            copy.args = (*copy.args[:WIDE], True, *copy.args[WIDE + 1 :])
        elif node.target is aten.sum.dim_IntList and node in self.sums:
            copy.kwargs = {**copy.kwargs, "dtype": accumulator_dtype(node.meta["val"].dtype)}
        return copy

    def _sizes(self, node: fx.Node, rows: Rows, copies: Mapping[fx.Node, fx.Node]) -> list[Any]:
        """The sizes of a view in a tile: 1 for all of its rows' dimensions but the last, which is the rest (or, expanded, stays)."""
        sizes: list[Any] = []
        for d, (size, given) in enumerate(zip(shape_of(node), node.args[1], strict=True)):  # type: ignore[arg-type]
            if d in rows:
                sizes.append(-1 if d == rows[-1] else 1)
            else:
                sizes.append(size if isinstance(size, int) else copies[given])
        return sizes

    def _summed(self, graph: fx.Graph, node: fx.Node, target: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> fx.Node:
        """A sum over the rows of one tile, added to that of the others."""
        if node.target in _PRODUCTS:
            left, right, alpha = _factors(node)
            copy = graph.call_function(add_product, (target, copies[left], copies[right], alpha))
        else:
            copy = graph.call_function(add_to, (target, self._copied(graph, node, copies)))
        copy.meta = dict(node.meta)
        return copy


def insert(segment: Segment, body: Body, loop: Loop, name: str, moved: dict[fx.Node, fx.Node]) -> None:
    """Put one call in the place of a part of a graph, whose nodes stand together. ``moved``: what stands for results of other parts."""
    nodes = [node for node in segment.nodes if node in segment.inside]
    graph = nodes[0].graph
    with graph.inserting_before(nodes[0]):
        call = graph.call_function(named(loop, name), ([moved.get(node, node) for node in body.operands],))
        call.meta = {key: fact for key, fact in nodes[0].meta.items() if key in ("nn_module_stack", "stack_trace", "seq_nr")}
        call.meta["val"] = [node.meta["val"] for node in body.results]
        for i, node in enumerate(body.results):
            fresh = graph.call_function(operator.getitem, (call, i))
            fresh.meta = {"val": node.meta["val"]}
            _replace(node, fresh, segment, moved)
    for node in reversed(nodes):
        graph.erase_node(node)
    for node in reversed(segment.nodes):
        if node in segment.repeated and not node.users:
            graph.erase_node(node)


def named(loop: Loop, name: str) -> Callable[[list], list[torch.Tensor]]:
    """A plain function, so that generated code can name it."""

    def run(operands: list) -> list[torch.Tensor]:
        return loop(operands)

    run.__name__ = run.__qualname__ = name
    run.__module__ = "fxfuse"
    return run


def _replace(node: fx.Node, fresh: fx.Node, segment: Segment, moved: dict[fx.Node, fx.Node]) -> None:
    """What is outside reads the new node, and views of it where it read views of the old one."""
    moved[node] = fresh
    for user in list(node.users):
        if user in segment.inside and is_view(user) and _read_outside(user, segment):
            view = node.graph.node_copy(user, lambda used: fresh if used is node else used)
            _replace(user, view, segment, moved)
    node.replace_all_uses_with(fresh, delete_user_cb=lambda user: user not in segment.inside and user is not fresh)


def _read_outside(node: fx.Node, segment: Segment) -> bool:
    return any(user not in segment.inside or (is_view(user) and _read_outside(user, segment)) for user in node.users)


def _maker(node: fx.Node) -> fx.Node:
    """The node that made the memory of a result that is all of it."""
    root = root_of(node)
    return root if shape_of(root) == shape_of(node) else node


def _factors(node: fx.Node) -> tuple[Any, Any, float]:
    left, right = node.args[:2]
    return left, right, float(node.args[2]) if node.target is calls.product else 1.0  # type: ignore[arg-type]


def _widen_sums(node: fx.Node, copy: fx.Node, summed: set[int]) -> None:
    """Sums over rows of a fused op leave a tile as wide as they are kept."""
    if not summed:
        return
    program = program_of(node)
    outputs = tuple(replace(o, dtype=str(accumulator_dtype(getattr(torch, o.dtype))).removeprefix("torch.")) if i in summed else o
                    for i, o in enumerate(program.outputs))
    copy.target, copy.args = fused_op, (copy.args[0], str(replace(program, outputs=outputs)))
    copy.meta["val"] = [v.to(accumulator_dtype(v.dtype)) if i in summed else v for i, v in enumerate(node.meta["val"])]
