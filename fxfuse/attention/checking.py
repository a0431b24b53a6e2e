"""May the op stand in for an attention: compared with float64 like any site, the result and the gradients of query, key and value.

The oracle is the model's own code between the two products, with the products around it. It runs on few queries and keys, in several
chunks; what is proven to be a mask hides the keys behind each query.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, fx

from .. import reference
from ..canonical.facts import known_shape, known_tensor, static_size, tensor_of, value_of
from ..errors import ValidationError
from ..program import Argument, Program
from ..trial import Compared
from ..validation import Verdict, judged
from .execution import Attention, backward, forward
from .hiding import mask_of
from .known_masks import forget_masks
from .match import Written
from .prepared import prepared

# Batch, key/value heads, queries (and keys) and queries in a chunk of a trial; at most this many heads to a group, and columns.
BATCH, HEADS, LENGTH, CHUNK, GROUP, WIDTH = 2, 2, 80, 32, 4, 64
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check(found: Written, program: Program, device: torch.device, mode: str) -> Verdict:
    """The verdict on a program, found once for equal sites."""
    if mode == "off":
        return Verdict()
    region = Between(found)
    key = ("attention", str(program), region.gm.code, known_tensor(found.query).dtype, _group(found), *_widths(found))
    return judged(key, partial(_trials, found, region, program, device), device, mode)


def _group(found: Written) -> int:
    heads = [static_size(known_shape(node)[1]) for node in (found.query, found.value)]
    return min(heads[0] // heads[1], GROUP) if heads[0] and heads[1] else 1


def _widths(found: Written) -> list[int]:
    key = known_shape(found.query)[3], known_shape(found.value)[3]
    return [min(static_size(size) or WIDTH, WIDTH) for size in key]


class Between:
    """The nodes between the products as a graph of their own: scores and the other operands in, weights out."""

    def __init__(self, found: Written) -> None:
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        members = set(found.region.nodes)
        ordered = [node for node in found.product.graph.nodes if node in members]
        arguments = {view.node: argument for view, argument in zip(found.region.arguments, found.program.arguments, strict=True)}
        outside = dict.fromkeys([found.product, *(o for n in ordered for o in n.all_input_nodes if o not in members)])
        self.inputs: list[Argument] = []
        self.dims: list[int] = []
        self.sized = False
        for node in outside:
            tensor = tensor_of(node)
            self.sized |= tensor is None or node not in arguments
            if not self.sized and tensor is not None:
                self.inputs.append(arguments[node])
                self.dims.append(tensor.dim())
            copies[node] = graph.placeholder(f"in_{len(copies)}")
            copies[node].meta = {"example_value": value_of(node)}
        for node in ordered:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(copies[found.region.outputs[0].node])
        self.gm = fx.GraphModule({}, graph)

    def run(self, named: dict[str, Tensor], dtypes: dict[torch.dtype, torch.dtype]) -> Tensor:
        tensors = [_of_dimension(named[a.name], dim) for a, dim in zip(self.inputs, self.dims, strict=True)]
        return Retyped(self.gm, dtypes).run(*tensors)


def _of_dimension(tensor: Tensor, dim: int) -> Tensor:
    return tensor.reshape(tensor.shape[tensor.dim() - dim :]) if tensor.dim() > dim else tensor


class Retyped(fx.Interpreter):
    """The graph with some dtypes put in place of others."""

    def __init__(self, gm: fx.GraphModule, dtypes: dict[torch.dtype, torch.dtype]) -> None:
        super().__init__(gm)
        self.dtypes = dtypes

    def run_node(self, node: fx.Node) -> object:
        if node.op not in ("call_function", "call_method"):
            return super().run_node(node)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.env[n])
        args, kwargs = torch.utils._pytree.tree_map(
            lambda a: self.dtypes.get(a, a) if isinstance(a, torch.dtype) else a, (args, dict(kwargs))
        )
        return getattr(self, node.op)(node.target, args, kwargs)


def _trials(found: Written, region: Between, program: Program, device: torch.device) -> Iterator[AttentionTrial]:
    """In the model's dtypes on the device and, where these are narrow, in float32, whose small errors show small faults."""
    yield AttentionTrial(found, region, program, device, {})
    wide = program.retyped({"float16": "float32", "bfloat16": "float32"})
    if wide != program:
        to_float = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
        yield AttentionTrial(found, region, wide, torch.device("cpu"), to_float)


@dataclass(frozen=True)
class AttentionTrial:
    """The same random operands through the model's code in float64, through it in some dtypes, and through the op's loop."""

    found: Written
    region: Between
    program: Program
    device: torch.device
    dtypes: dict[torch.dtype, torch.dtype]

    def run(self, scale: float, rows: int) -> Iterator[Compared]:
        if self.region.sized:
            raise ValidationError("what makes weights of its scores depends on sizes, and cannot be tried on fewer keys")
        generator = torch.Generator().manual_seed(7)
        operands, others, arriving = self._drawn(scale, generator)
        truth = self._eager([t.double() for t in operands], {n: _wide(t) for n, t in others.items()}, arriving.double(),
                            {dtype: torch.float64 for dtype in _FLOATS})
        there = [t.to(self.device) for t in operands]
        placed = {name: tensor.to(self.device) for name, tensor in others.items()}
        as_named = torch.autocast(self.device.type, enabled=False) if self.dtypes else nullcontext()
        with as_named:  # autocast would multiply the float32 of this trial in 16 bits
            eager = self._eager(there, placed, arriving.to(self.device), self.dtypes)
        ours = self._ours(there, placed, arriving.to(self.device))
        for name, a, b, t in zip(("the result", "d query", "d key", "d value"), ours, eager, truth, strict=True):
            yield Compared(name, a.cpu(), b.cpu(), t.cpu())

    def _drawn(self, scale: float, generator: torch.Generator) -> tuple[list[Tensor], dict[str, Tensor], Tensor]:
        """Query, key and value in the site's dtype; the other operands by name; the gradient that arrives."""
        heads, (inner, outer) = HEADS * _group(self.found), _widths(self.found)
        dtype = known_tensor(self.found.result).dtype
        dtype = self.dtypes.get(dtype, dtype)
        shapes = ((BATCH, heads, LENGTH, inner), (BATCH, HEADS, LENGTH, inner), (BATCH, HEADS, LENGTH, outer))
        sizes = (scale, 1.0, scale)  # scores of the inputs' scale
        operands = [(torch.randn(s, generator=generator) * size).to(dtype) for s, size in zip(shapes, sizes, strict=True)]
        mask = mask_of(self._alone(), self.found.scores)
        others = {a.name: self._other(a, heads, mask is not None and mask.position == i, generator)
                  for i, a in enumerate(self.program.arguments) if a.name != self.found.scores}
        arriving = torch.randn((BATCH, heads, LENGTH, outer), generator=generator).to(dtype)
        return operands, others, arriving

    def _alone(self) -> Program:
        return replace(self.program, outputs=self.program.outputs[:1])

    def _other(self, argument: Argument, heads: int, hides: bool, generator: torch.Generator) -> Tensor:
        full = (BATCH, heads, LENGTH)
        shape = [size if flag else 1 for size, flag in zip(full, argument.rows, strict=True)]
        shape.append(LENGTH if isinstance(argument.columns, str) else 1)
        dtype = reference.torch_dtype(argument.dtype)
        seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        if argument.kind == "real":
            values = torch.randn(shape, generator=generator).to(dtype)
            return torch.where(seen[: shape[2]], values * 0, torch.finfo(dtype).min).expand(shape).contiguous() if hides else values
        if argument.kind == "bool":
            mask = mask_of(self._alone(), self.found.scores)
            return (seen[: shape[2]] != (mask.hides if mask else False)).expand(shape).contiguous()
        return torch.zeros(shape, dtype=dtype)

    def _eager(self, operands: Sequence[Tensor], others: dict[str, Tensor], arriving: Tensor,
               dtypes: dict[torch.dtype, torch.dtype]) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in operands]
        query, key, value = leaves
        repeat = query.shape[1] // key.shape[1]
        scores = torch.matmul(query, key.repeat_interleave(repeat, 1).transpose(2, 3))
        weights = self.region.run({**others, self.found.scores: scores}, dtypes)
        result = torch.matmul(weights.to(value.dtype), value.repeat_interleave(repeat, 1))
        return [result.detach(), *torch.autograd.grad(result, leaves, arriving)]

    def _ours(self, operands: Sequence[Tensor], others: dict[str, Tensor], arriving: Tensor) -> list[Tensor]:
        names = [a.name for a in self.program.arguments if a.name != self.found.scores]
        query, key, value = operands
        call = Attention(query, key, value, [others[name] for name in names], prepared(str(self.program), self.found.scores), CHUNK)
        with torch.no_grad():
            result, *statistics = forward(call)
            found = [result, *backward(call, arriving, statistics)]
        forget_masks()
        return found


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
