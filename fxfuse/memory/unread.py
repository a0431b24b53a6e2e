"""A forward graph whose outputs nobody will read: what is computed for them alone is left out.

When a checkpoint runs a block again, it wants what the block saves for its backward. The block's last projection,
its dequantized weight and the residual sum lead to the output and to nothing that is saved: they are dropped, and
the output is memory of its shape, never written.

Two kinds of need are told apart: a value, and only its shape (``empty_like``, the mask of a dropout). What is needed
for its shape alone is replaced by unwritten memory as well. Random numbers are drawn as before, so that
the generator ends where it would have.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor, fx

from .._torch import make_graph_module
from .joint import is_view

aten = torch.ops.aten
PRODUCTS = tuple(op.default for op in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm))
# Operations that look at no element of their first operand.
_SHAPE_ONLY = frozenset(
    overload
    for name in ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_empty", "new_zeros",
                 "new_ones", "new_full", "sym_size", "sym_stride", "sym_numel", "sym_storage_offset")
    for overload in (getattr(getattr(aten, name), kind) for kind in getattr(aten, name).overloads())
)  # fmt: skip


class Unread(NamedTuple):
    """The graph without its outputs' own work; of how many matrix products how many were dropped."""

    gm: fx.GraphModule
    dropped: int
    products: int

    def __str__(self) -> str:
        if not self.dropped:
            return "what only their output needs"
        return f"what only their output needs ({self.dropped} of {self.products} matrix products)"


def without_outputs(forward: fx.GraphModule, unread: Collection[int]) -> Unread | None:
    """A copy of ``forward`` in which the outputs at the positions ``unread`` are unwritten memory.

    None where that saves nothing, or where a shape cannot be told. ``forward`` must be functional: anything that
    writes is kept with all it needs.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    returned = graph.graph_copy(forward.graph, copies)
    node = graph.output(returned)
    node.meta = dict(forward.graph.output_node().meta)
    work = _Dropping(graph, unread)
    before = _computing(graph)
    if not work.drop():
        return None
    after = _computing(graph)
    if len(after) >= len(before):
        return None
    graph.lint()
    dropped = sum(n.target in PRODUCTS for n in before) - sum(n.target in PRODUCTS for n in after)
    gm = make_graph_module(forward, graph)
    gm.meta = dict(forward.meta)
    return Unread(gm, dropped, sum(n.target in PRODUCTS for n in before))


def _computing(graph: fx.Graph) -> list[fx.Node]:
    """What runs on the device and fills memory."""
    return [n for n in graph.nodes
            if n.op == "call_function" and isinstance(n.target, torch._ops.OpOverload) and n.target not in _SHAPE_ONLY
            and n.target is not aten.empty_strided.default and not is_view(n)]  # fmt: skip


class _Dropping:
    """``values``: nodes whose values are needed; ``shapes``: nodes that are needed for their shape."""

    def __init__(self, graph: fx.Graph, unread: Collection[int]) -> None:
        self.graph = graph
        self.output = graph.output_node()
        self.unread = unread
        self.sizes = _Sizes(graph)
        self.values: set[fx.Node] = set()
        self.shapes: set[fx.Node] = set()

    def drop(self) -> bool:
        """In place; whether there was anything to drop."""
        returned: list[Any] = list(self.output.args[0])  # type: ignore[arg-type]
        candidates = [i for i in self.unread if isinstance(returned[i], fx.Node) and self.sizes.known(returned[i])]
        kept = [node for i, node in enumerate(returned) if isinstance(node, fx.Node) and i not in candidates]
        acting = [node for node in self.graph.nodes if node.op == "call_function" and node.is_impure()]
        self._need([*kept, *acting])
        replaced = [i for i in candidates if returned[i] not in self.values]
        if not replaced:
            return False
        for node in [n for n in self.graph.nodes if n in self.shapes and n not in self.values]:
            node.replace_all_uses_with(self._unwritten(node, before=node))
        for i in replaced:
            returned[i] = self._unwritten(returned[i], before=self.output)
        self.output.args = (tuple(returned),)
        self.graph.eliminate_dead_code()
        return True

    def _need(self, roots: Sequence[fx.Node]) -> None:
        pending = list(roots)
        while pending:
            node = pending.pop()
            if node in self.values:
                continue
            self.values.add(node)
            if node.target is operator.getitem and node.args[1] == 0 and _is_dropout(node.args[0]):
                pending.append(node.args[0].args[0])  # type: ignore[union-attr, arg-type]
            for used in node.all_input_nodes:
                if _only_shape(node, used) and self.sizes.known(used):
                    self.shapes.add(used)
                else:
                    pending.append(used)

    def _unwritten(self, node: fx.Node, before: fx.Node) -> fx.Node:
        """Memory like ``node``'s."""
        value: Tensor = node.meta["val"]
        size, stride = ([self.sizes.node(s) for s in dims] for dims in (value.shape, value.stride()))
        with self.graph.inserting_before(before):
            made = self.graph.call_function(
                aten.empty_strided.default, (size, stride), dict(dtype=value.dtype, device=value.device)
            )
        made.meta = {"val": value}
        return made


def _is_dropout(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is aten.native_dropout.default


def _only_shape(node: fx.Node, used: fx.Node) -> bool:
    """Does ``node`` look at no element of ``used``. (A dropout's mask does not depend on what it is laid over.)"""
    if node.args[0] is not used or used in node.args[1:] or used.op == "placeholder":
        return False
    return _is_dropout(node) or node.target in _SHAPE_ONLY


class _Sizes:
    """Sizes and strides as nodes: numbers, inputs that are sizes, sizes of inputs, and their products and sums."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.made: dict[sympy.Expr, Any] = {}
        self.appended: set[fx.Node] = set()
        self.inputs: dict[sympy.Expr, tuple[fx.Node, int]] = {}
        for node in graph.find_nodes(op="placeholder"):
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt):
                self.made.setdefault(value.node.expr, node)
            elif isinstance(value, Tensor):
                for d, size in enumerate(value.shape):
                    if isinstance(size, torch.SymInt):
                        self.inputs.setdefault(size.node.expr, (node, d))

    def known(self, node: fx.Node) -> bool:
        """Can memory like this tensor's be made."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            return False
        return all(self._expressible(_expression(s)) for s in (*value.shape, *value.stride()))

    def _expressible(self, expr: sympy.Expr) -> bool:
        if expr.is_Integer or expr in self.made or expr in self.inputs:
            return True
        return (expr.is_Add or expr.is_Mul) and all(map(self._expressible, expr.args))

    def node(self, size: int | torch.SymInt) -> Any:
        """An int, or the node that gives this size."""
        return self._node(_expression(size))

    def _node(self, expr: sympy.Expr) -> Any:
        if expr.is_Integer:
            return int(expr)
        if expr not in self.made:
            if expr in self.inputs:
                source, d = self.inputs[expr]
                self.made[expr] = self._append(aten.sym_size.int, source, d)
            else:
                combine = operator.add if expr.is_Add else operator.mul
                self.made[expr] = reduce(partial(self._append, combine), map(self._node, expr.args))
        return self.made[expr]

    def _append(self, function: Any, *args: Any) -> Any:
        """A new node behind the inputs and what was appended there before."""
        if all(isinstance(arg, int) for arg in args):
            return function(*args)
        inputs = ("placeholder", "get_attr")
        first = next(n for n in self.graph.nodes if n.op not in inputs and n not in self.appended)
        with self.graph.inserting_before(first):
            node = self.graph.call_function(function, args)
        self.appended.add(node)
        return node


def _expression(size: int | torch.SymInt) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)
