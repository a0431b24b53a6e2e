"""One linear with its loss as a graph of its own, so that it can be checked like any region.

The oracle is the model's own code, from the rows of the hidden states on. It runs on few rows and on few hidden columns, which are only
terms of a sum. The number of classes stays what it is on a GPU, where the choice of kernels depends on it, and is reduced elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .._torch import make_graph_module
from ..canonical.facts import known_dtype, known_shape, known_tensor, static_size, statically_one, value_of
from ..canonical.vocabulary import CAST, aten
from ..program import Argument, Program
from ..regions import Region
from ..regions.layout import Layout
from ..regions.region import ArgumentView, OutputView, call
from ..site_graph import SiteGraph, Sizes
from ..surgery import erase_dead, sort_topologically
from ..trial import Trial
from .match import LinearLoss
from .products import left_name, right_name
from .surgery import Plan, replace_linear_loss
from .terms import Term

# Of a trial: rows; hidden columns; classes, where their number makes no difference to what runs; elements of the logits.
ROWS, COLUMNS, CLASSES, ELEMENTS = 251, 32, 1024, 1 << 20


class LossSite(SiteGraph):
    """A linear and its loss: ``original`` as the model wrote it, ``fused(program)`` by the op, in the plan's mode.

    rows: how many (about), None: as many as the model has
    """

    def __init__(self, found: LinearLoss, plan: Plan, rows: int | None = None) -> None:
        self.whole, self.plan, self.rows = found, plan, rows
        alone = Alone(found, plan, rows)
        self.region, self.original = alone.region, make_graph_module({}, alone.graph)
        self.classes, self.columns = static_size(known_shape(found.linear)[-1]), static_size(known_shape(found.hidden)[-1])
        self.sources = self.inputs = alone.inputs
        self.weights = {alone.inputs[1], *(term.right for term in alone.found.terms)}
        self._fused: dict[Program, fx.GraphModule] = {}
        self._arguments = dict(zip((view.node for view in self.region.arguments), self.region.program.arguments, strict=True))
        self._layouts = {view.node: view.layout for view in self.region.arguments}
        self.wanted = [i for i, name in enumerate(found.operands) if name in plan.wanted]

    def _replaced(self, program: Program) -> fx.GraphModule:
        alone = Alone(self.whole, self.plan, self.rows)
        replace_linear_loss(alone.graph, alone.found, replace(alone.plan, program=program))
        sort_topologically(alone.graph)
        erase_dead(alone.graph)
        alone.graph.lint()
        return make_graph_module({}, alone.graph)

    def narrowed(self, program: Program, device: torch.device) -> Program:
        """A program of the plan over the number of classes that is tried on a device."""
        return replace(program, axes=tuple((name, self.classes_on(device)) for name, _ in program.axes))

    def classes_on(self, device: torch.device) -> int:
        assert self.classes is not None
        return self.classes if device.type == "cuda" else min(self.classes, CLASSES)


class Alone:
    """A copy of the linear (of hidden states whose rows are taken already), the region and its tail, in a graph with its own inputs."""

    def __init__(self, found: LinearLoss, plan: Plan, rows: int | None) -> None:
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}
        self.inputs: list[fx.Node] = []
        self.sizes = {} if rows is None else _row_sizes(known_shape(found.view.node)[:-1], rows)
        logits = self._sized(known_tensor(found.view.node), found.view.layout)
        hidden = self._input(logits.new_empty((*logits.shape[:-1], known_shape(found.hidden)[-1]), dtype=known_dtype(found.hidden)))
        weight = self._input(value_of(found.weight))
        bias = None if found.bias is None else self._input(value_of(found.bias))
        linear = self._linear(found, logits, hidden, weight, bias)
        terms = [self._term(found, logits, term) for term in found.terms]
        total, between = self._sum(found, linear, terms)
        self.copies[found.view.node] = total
        region = self._region(found)
        self.found = LinearLoss(linear, hidden, weight, bias, [], region, found.logits, terms=tuple(terms), between=tuple(between))
        tail = plan.tail if plan.tail is None or plan.tail.total is None \
            else plan.tail.replay(self.graph, region.outputs[0].node, self._copy)
        self.plan = replace(plan, tail=tail)
        results = region.outputs if tail is None or tail.total is None \
            else [OutputView(tail.total, Layout((), False), region.outputs[0].names, loss_reduction=2), *region.outputs[1:]]
        self.graph.output(tuple(result.node for result in results))
        program, arguments = self._as_arguments(found, region, hidden, weight, bias)
        self.region = Region(program, arguments, results, [linear, *between, *region.nodes], found.module)

    def _region(self, found: LinearLoss) -> Region:
        """The region over copies of its nodes, with the rows that are tried."""
        for view in found.region.arguments:
            if view.node not in self.copies:
                self.copies[view.node] = self._input(self._sized(value_of(view.node), view.layout))
        members = set(found.region.nodes)
        for node in (n for n in found.linear.graph.nodes if n in members):
            for operand in node.all_input_nodes:
                self._copy(operand)
            self.copies[node] = self.graph.node_copy(node, self.copies.__getitem__)
        outputs = [replace(view, node=self.copies[view.node]) for view in found.region.outputs]
        for output in outputs:
            output.node.meta["example_value"] = self._sized(known_tensor(output.node), output.layout)
        return replace(found.region, outputs=outputs, nodes=[self.copies[node] for node in found.region.nodes],
                       arguments=[replace(view, node=self.copies[view.node]) for view in found.region.arguments])

    def _sized(self, value: Any, layout: Layout) -> Any:
        """A tensor of the region with the rows that are tried."""
        if not self.sizes or not isinstance(value, Tensor):
            return value
        dims = (*layout.dims, *(None,) * value.dim())
        return value.new_empty([size if dim is None else self.sizes[dim] for size, dim in zip(value.shape, dims, strict=False)])

    def _input(self, value: Any) -> fx.Node:
        node = self.graph.placeholder(f"in_{len(self.inputs)}")
        node.meta["example_value"] = value
        self.inputs.append(node)
        return node

    def _copy(self, node: fx.Node, shape: tuple[Any, ...] | None = None) -> fx.Node:
        """What a node is here: a copy, or an input; ``shape``: as one number for each row of such a shape."""
        if node not in self.copies or shape is not None:
            value = value_of(node)
            self.copies[node] = self._input(value if shape is None else value.new_empty(shape))
        return self.copies[node]

    def _linear(self, found: LinearLoss, logits: Tensor, *operands: fx.Node | None) -> fx.Node:
        """The linear with the casts that autocast makes around it."""
        typed = [node if node is None else self._typed(node, logits.dtype) for node in operands]
        linear = self.graph.call_function(F.linear, tuple(typed))
        linear.meta = {**found.linear.meta, "example_value": logits}
        return linear

    def _term(self, found: LinearLoss, logits: Tensor, term: Term) -> Term:
        """A term over inputs of its own, in the dtypes of the model's."""
        left, right = known_tensor(term.left), known_tensor(term.right)
        rows = self._input(logits.new_empty((*logits.shape[:-1], left.shape[-1]), dtype=left.dtype))
        return replace(term, left=rows, right=self._input(right))

    def _sum(self, found: LinearLoss, linear: fx.Node, terms: Sequence[Term]) -> tuple[fx.Node, list[fx.Node]]:
        """What is added to the linear, as products/ writes it, and the nodes that do it."""
        total, between = linear, []
        for term in terms:
            base, narrow = total, known_dtype(total)
            dtype = torch.float32 if term.wide else narrow
            wide = self._typed(base, dtype)
            left, right = (self._typed(node, dtype) for node in (term.left, term.right))
            shapes = ((wide, [-1, known_shape(base)[-1]]), (left, [-1, known_shape(left)[-1]]))
            matrices = [call(self.graph, base, aten.reshape.default, node, shape) for node, shape in shapes]
            across = call(self.graph, base, aten.t.default, right)
            added = self.graph.call_function(torch.addmm, (*matrices, across), {"alpha": term.factor})
            added.meta = {**found.linear.meta, "example_value": known_tensor(matrices[0])}
            shaped = call(self.graph, added, aten.view_as.default, added, base)
            total = self._typed(shaped, narrow)
            between += [wide, *matrices, across, added, shaped, total] if term.wide else [*matrices, across, added, total]
        return total, between

    def _typed(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        if known_dtype(node) == dtype:
            return node
        cast = self.graph.call_function(CAST, (node, dtype))
        cast.meta["example_value"] = known_tensor(node).to(dtype)
        return cast

    def _as_arguments(self, found: LinearLoss, region: Region, hidden: fx.Node, weight: fx.Node, bias: fx.Node | None
                      ) -> tuple[Program, list[ArgumentView]]:
        """The inputs as arguments of a program (which is never run): how they are drawn, and how they lie in the rows."""
        rank = found.program.rank
        views = [ArgumentView(hidden, found.view.layout, rank), ArgumentView(weight, Layout((None,)), rank)]
        views += [] if bias is None else [ArgumentView(bias, Layout(()), rank)]
        kinds = [Argument("hidden", _name(known_dtype(hidden)), (True,) * rank, 1)]
        kinds += [Argument(name, _name(known_dtype(node)), (False,) * rank, 1) for name, node in (("weight", weight), ("bias", bias))
                  if node is not None]
        for k, term in enumerate(self.found.terms):
            views += [ArgumentView(term.left, found.view.layout, rank), ArgumentView(term.right, Layout((None,)), rank)]
            kinds += [Argument(left_name(k), _name(known_dtype(term.left)), (True,) * rank, 1),
                      Argument(right_name(k), _name(known_dtype(term.right)), (False,) * rank, 1)]
        for view, argument in zip(region.arguments, found.program.arguments, strict=True):
            if argument.name != found.logits:
                views.append(view)
                kinds.append(replace(argument, columns=None if argument.columns is None else 1))
        return replace(found.program, arguments=tuple(kinds)), views


def _row_sizes(shape: Sequence[Any], rows: int) -> dict[int, int]:
    """Sizes of the dimensions of rows: about ``rows`` in all, odd, and 1 where there is always one."""
    free = [dim for dim, size in enumerate(shape) if not statically_one(size)]
    sizes = dict.fromkeys(range(len(shape)), 1)
    for dim, small in zip(free, (3, 2, 2, *(1,) * len(free))[: max(len(free) - 1, 0)], strict=False):
        sizes[dim], rows = small, rows // small
    return sizes if not free else {**sizes, free[-1]: max(rows, 3) | 1}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class LossTrial(Trial):
    """A trial of a linear and its loss: weights of a size that keeps the logits at that of the hidden states."""

    site: LossSite

    def run_sizes(self, rows: int) -> Sizes:
        before = (self.site.columns, self.site.classes)
        after = (COLUMNS, self.site.classes_on(self.device))
        return Sizes(self.site.region, {}, {b: min(a, b) for b, a in zip(before, after, strict=True) if b is not None})

    def _drawn(self, index: int, sizes: Sizes, scale: float, generator: torch.Generator, positive: bool) -> Any:
        drawn = self.site.inputs[index]
        if drawn not in self.site.weights:
            return super()._drawn(index, sizes, scale, generator, positive)
        shape, dtype = sizes.shape(drawn), known_dtype(drawn)
        values = torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device) / shape[-1] ** 0.5
        return values.to(dtype).double()
