"""Logits as a graph output, where the loss is computed without them: a description from which they can be had on demand.

Where a linear and its loss become one op, nothing in the graph holds the logits any more. If they are an output of the graph, that
output becomes None, and a ``LazyOutput`` in ``gm.meta["fxfuse_lazy_outputs"]`` (a list) says how to compute it: the slice of the
original canonical graph that leads to it, from the graph's own inputs. The ops of that slice are ordinary differentiable ATen ops
(and ``F.linear``), run above autograd by whoever wants the value.

The outer callable (the one that Dynamo calls with the graph's inputs) keeps the values of its inputs for the outputs it hands out:

    for lazy in gm.meta.get("fxfuse_lazy_outputs", ()):
        picked = lazy.pick(arguments)          # the values it needs, of all inputs in the placeholders' order
        lazy.sizes(picked), lazy.dtype, lazy.device, lazy.requires_grad      # known without computing anything
        lazy.compute(picked)                   # the tensor that the graph would have returned at ``lazy.index``
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx

LAZY_OUTPUTS = "fxfuse_lazy_outputs"  # key of ``GraphModule.meta``


@dataclass(frozen=True, eq=False)
class LazyOutput:
    """One output of a graph that is computed on demand.

    index:         its position among the graph's outputs, where the graph gives None
    graph:         takes the values of the placeholders at ``inputs``, in that order, and returns the tensor (not in a tuple)
    inputs:        positions among the placeholders of the graph that gave the output up (symbolic sizes are placeholders too)
    shape:         its sizes as they were at capture, symbolic where the graph's are; ``sizes`` gives those of a call
    requires_grad: whether the output had a gradient at capture
    autocast:      (enabled, dtype) for ``device`` when the graph was captured; ``compute`` runs under the same
    """

    index: int
    graph: fx.GraphModule
    inputs: tuple[int, ...]
    shape: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    autocast: tuple[bool, torch.dtype]
    _sizes: Callable[..., Sequence[int]] = field(repr=False)

    def pick(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """Of the values of all placeholders those that this output is computed from."""
        return tuple(arguments[position] for position in self.inputs)

    def sizes(self, picked: Sequence[Any]) -> tuple[int, ...]:
        """The shape that ``compute(picked)`` will have; nothing is computed."""
        return tuple(map(int, self._sizes(*picked)))

    def compute(self, picked: Sequence[Any]) -> Tensor:
        """The output, with its autograd graph where gradients are on."""
        enabled, dtype = self.autocast
        with torch.autocast(self.device.type, dtype=dtype, enabled=enabled):
            return self.graph(*picked)


def describe_output(gm: fx.GraphModule, index: int, node: fx.Node) -> LazyOutput:
    """How the output ``node`` of a canonical graph is computed from the graph's inputs. The graph is left as it is."""
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    value = node.meta.get("example_value", node.meta.get("val"))
    needed = _ancestors(node)
    needed |= _carriers(placeholders, value.shape, needed)
    kept = [i for i, placeholder in enumerate(placeholders) if placeholder in needed]
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for original in gm.graph.nodes:
        if original in needed:
            copies[original] = graph.node_copy(original, copies.__getitem__)
    graph.output(copies[node])
    graph.lint()
    return LazyOutput(
        index, fx.GraphModule(gm, graph), tuple(kept), tuple(value.shape), value.dtype, value.device, bool(value.requires_grad),
        (torch.is_autocast_enabled(value.device.type), torch.get_autocast_dtype(value.device.type)),
        _size_function([placeholders[i] for i in kept], value.shape),
    )


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """The node and all that it is computed from."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current not in found:
            found.add(current)
            pending += current.all_input_nodes
    return found


def _symbols_of(placeholder: fx.Node) -> Iterator[tuple[sympy.Symbol, int | None]]:
    """The symbolic sizes that a value carries: itself (None), or its dimensions."""
    value = placeholder.meta.get("example_value", placeholder.meta.get("val"))
    for dim, size in enumerate(value.shape) if isinstance(value, Tensor) else [(None, value)]:
        if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
            yield size.node.expr, dim


def _carriers(placeholders: Sequence[fx.Node], shape: Sequence[Any], needed: set[fx.Node]) -> set[fx.Node]:
    """Inputs that a shape's symbols are read off, where the inputs needed anyway do not carry them."""
    wanted = {symbol for size in shape if isinstance(size, torch.SymInt) for symbol in size.node.expr.free_symbols}
    wanted -= {symbol for placeholder in placeholders if placeholder in needed for symbol, _ in _symbols_of(placeholder)}
    found = {symbol: placeholder for placeholder in placeholders for symbol, _ in _symbols_of(placeholder) if symbol in wanted}
    return set(found.values())


def _size_function(placeholders: Sequence[fx.Node], shape: Sequence[Any]) -> Callable[..., Sequence[int]]:
    """A function of the placeholders' values that gives the sizes: symbols are read off the values that carry them."""
    if all(isinstance(size, int) for size in shape):
        constant = tuple(shape)
        return lambda *values: constant
    sources: dict[sympy.Symbol, tuple[int, int | None]] = {}
    for position, placeholder in enumerate(placeholders):
        for symbol, dim in _symbols_of(placeholder):
            sources.setdefault(symbol, (position, dim))
    expressions = [size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size) for size in shape]
    evaluate = sympy.lambdify(list(sources), expressions, modules="math")
    where = list(sources.values())

    def sizes(*values: Any) -> Sequence[int]:
        return evaluate(*(values[i] if dim is None else values[i].shape[dim] for i, dim in where))

    return sizes
