"""One region as a graph of its own: what it was, and what replaces it, both runnable on small inputs.

The original nodes are the oracle. They run three times: in float64 for the truth, in float32, and in the model's own
dtypes for eager's error. Leading dimensions are made small, columns keep their width.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from ._torch import make_graph_module
from .canonical.facts import known_tensor, tensor_of, value_of
from .program import Argument, Program
from .regions import Region
from .regions.layout import Layout
from .surgery import erase_dead, replace_region, sort_topologically

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CAST_METHODS = ("float", "double", "half", "bfloat16")


class SiteGraph:
    """``original`` computes the region's outputs from ``inputs`` as the model wrote it; ``fused(program)`` with the op."""

    def __init__(self, region: Region, differentiable: Collection[fx.Node]) -> None:
        self.region = region
        self._fused: dict[Program, fx.GraphModule] = {}
        graph, copies = _copied(region)
        self.original = make_graph_module({}, graph)
        # The nodes of the whole graph that the region reads, and their placeholders here.
        self.sources = [node for node, copy in copies.items() if copy.op == "placeholder"]
        self.inputs = [copies[node] for node in self.sources]
        self._arguments = {view.node: a for view, a in zip(region.arguments, region.program.arguments, strict=True)}
        self._layouts = {view.node: view.layout for view in region.arguments}
        self.wanted = [i for i, node in enumerate(self.sources)
                       if node in differentiable and node in self._arguments and known_tensor(node).is_floating_point()]

    def argument_of(self, index: int) -> Argument:
        """The program argument that an input is, or one made up for an input that the program does not need."""
        tensor = known_tensor(self.inputs[index])
        found = self._arguments.get(self.sources[index])
        return found or Argument("", str(tensor.dtype).removeprefix("torch."), (True,), None)

    def fused(self, program: Program) -> fx.GraphModule:
        """The same outputs from the same inputs, by the fused op; made once for a program."""
        if program not in self._fused:
            self._fused[program] = self._replaced(program)
        return self._fused[program]

    def _replaced(self, program: Program) -> fx.GraphModule:
        graph, copies = _copied(self.region)
        region = replace(
            self.region,
            arguments=[replace(view, node=copies[view.node]) for view in self.region.arguments],
            outputs=[replace(view, node=copies[view.node]) for view in self.region.outputs],
            nodes=[copies[node] for node in self.region.nodes],
        )
        replace_region(graph, region, program)
        sort_topologically(graph)
        erase_dead(graph)
        graph.lint()
        return make_graph_module({}, graph)

    def layout_of(self, index: int) -> Layout | None:
        """How an input lies in the region's domain; None for one that the program does not take."""
        return self._layouts.get(self.sources[index])

    def sizes(self, rows: int) -> Sizes:
        """Small sizes for the leading dimensions: about ``rows`` rows in all."""
        return Sizes.choose(self, rows)

    def text(self) -> str:
        """The original nodes with the facts of the inputs: equal texts are equal sites."""
        facts = [f"{tuple(t.shape)} {t.dtype}" for n in self.inputs if (t := tensor_of(n)) is not None]
        return "\n".join([self.original.code, *facts, str(self.wanted)])


def _copied(region: Region) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """The region's nodes in a new graph; what they read from outside are its inputs."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    members = set(region.nodes)
    ordered = [node for node in region.nodes[0].graph.nodes if node in members]
    outside = dict.fromkeys([*(view.node for view in region.arguments),
                             *(operand for node in ordered for operand in node.all_input_nodes if operand not in members)])
    for node in outside:
        copies[node] = graph.placeholder(f"in_{len(copies)}")
        copies[node].meta = {"example_value": value_of(node)}
    for node in ordered:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[view.node] for view in region.outputs))
    return graph, copies


class Sizes:
    """Small sizes for symbols and, where sizes are plain numbers, for the sizes of leading dimensions."""

    def __init__(self, region: Region, symbols: dict[sympy.Symbol, int], numbers: dict[int, int]) -> None:
        self.symbols = symbols
        self.numbers = numbers
        # Two symbols that guards hold equal (tokens of logits and of labels) are one dimension of the domain.
        self.domain: dict[int, int] = {}
        for view in region.arguments:
            for dim, size in zip(view.layout.dims, known_tensor(view.node).shape, strict=False):
                if dim is not None:
                    self.domain.setdefault(dim, self.size(size))

    @classmethod
    def choose(cls, site: SiteGraph, rows: int) -> Sizes:
        symbols: dict[sympy.Symbol, int] = {}
        leading: dict[int, None] = {}
        free: dict[sympy.Symbol, None] = {}
        kept: set[int] = set()
        for view in site.region.arguments:
            shape = known_tensor(view.node).shape
            for i, size in enumerate(shape):
                leads = i < len(view.layout.dims) and view.layout.dims[i] is not None
                if isinstance(size, torch.SymInt):
                    found = dict.fromkeys(sorted(size.node.expr.free_symbols, key=str))
                    free |= found
                    if not leads:  # a symbolic width stays what it was at capture
                        symbols |= {symbol: _hint_of(size, symbol) for symbol in found}
                elif leads and size > 1:
                    leading[int(size)] = None
                else:
                    kept.add(int(size))
        for node in site.inputs:
            if isinstance(value := value_of(node), torch.SymInt):
                free |= dict.fromkeys(sorted(value.node.expr.free_symbols, key=str))
        for symbol in symbols:
            free.pop(symbol, None)
        small = _small_sizes(len(free) + len(leading), rows)
        for symbol in free:
            symbols[symbol] = small.pop()
        # A number that is a leading size here and a width there stays what it is.
        numbers = {size: min(size, small.pop()) for size in leading if size not in kept}
        return cls(site.region, symbols, numbers)

    def shape(self, node: fx.Node, layout: Layout | None = None) -> tuple[int, ...]:
        """The small shape of a node, given how it lies in the domain."""
        dims = () if layout is None else layout.dims
        return tuple(
            self.domain[dims[i]] if i < len(dims) and dims[i] is not None else self.size(size)  # type: ignore[index]
            for i, size in enumerate(known_tensor(node).shape)
        )

    def size(self, size: Any) -> int:
        """What a size of the graph is here."""
        if isinstance(size, torch.SymInt):
            small = size.node.expr.subs(self.symbols)
            return int(small) if small.is_number else size.node.hint
        return self.numbers.get(int(size), int(size))


def _hint_of(size: torch.SymInt, symbol: sympy.Symbol) -> int:
    """What a symbol was when the graph was captured."""
    shapes = size.node.shape_env
    values = shapes.backed_var_to_val if hasattr(shapes, "backed_var_to_val") else shapes.var_to_val
    return int(values[symbol])


def _small_sizes(count: int, rows: int) -> list[int]:
    """Sizes, the last one largest, odd and with a product of about ``rows``."""
    sizes = [2, 3, 2, 3][: max(count - 1, 0)]
    sizes += [2] * (count - 1 - len(sizes))
    product = 1
    for size in sizes:
        product *= size
    return [*sizes, max(rows // product, 3) | 1] if count else []


class Instance(fx.Interpreter):
    """Runs a site's graph with its dtypes replaced, and numbers that are leading sizes replaced by the small ones."""

    def __init__(self, gm: fx.GraphModule, dtypes: dict[torch.dtype, torch.dtype], sizes: Sizes) -> None:
        super().__init__(gm, garbage_collect_values=True)
        self.dtypes = dtypes
        self.numbers = sizes.numbers

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        if self.numbers and isinstance(target, torch._ops.OpOverload) and target._schema.name in _SIZED:
            args = (args[0], [self.numbers.get(s, s) if isinstance(s, int) else s for s in args[1]], *args[2:])
        return super().call_function(target, *self._retyped(args, kwargs))

    def call_method(self, target: Any, args: tuple, kwargs: dict) -> Any:
        if target in _CAST_METHODS:
            return args[0].to(self.dtypes.get(getattr(args[0], target)().dtype, args[0].dtype))
        return super().call_method(target, *self._retyped(args, kwargs))

    def _retyped(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        retype = lambda a: self.dtypes.get(a, a) if isinstance(a, torch.dtype) else a  # noqa: E731
        return tuple(retype(a) for a in args), {key: retype(value) for key, value in kwargs.items()}


_SIZED = ("aten::reshape", "aten::view", "aten::expand")


def run_with_gradients(gm: fx.GraphModule | fx.Interpreter, inputs: Sequence[Any], wanted: Sequence[int],
                       cotangents: Sequence[Tensor]) -> list[Tensor | None]:
    """Outputs, then gradients of the inputs at the ``wanted`` positions, for given cotangents."""
    leaves = list(inputs)
    for i in wanted:
        leaves[i] = leaves[i].detach().clone().requires_grad_()
    with torch.enable_grad():
        outputs = list(gm.run(*leaves) if isinstance(gm, fx.Interpreter) else gm(*leaves))
        live = [(o, g.to(o.device, o.dtype)) for o, g in zip(outputs, cotangents, strict=True) if o.requires_grad]
        if not live or not wanted:
            return [*outputs, *[None] * len(wanted)]
        grads = torch.autograd.grad([o for o, _ in live], [leaves[i] for i in wanted], [g for _, g in live], allow_unused=True)
    return [*(o.detach() for o in outputs), *grads]
