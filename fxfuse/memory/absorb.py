"""A sum of a fused op's output and another tensor becomes part of the op.

Where a tensor is read both by a norm and by what goes past it, its gradient is the sum of two: autograd adds to the norm's gradient
what comes along the other way. As part of the norm's backward the sum is neither a launch nor two more passes over the tensor. It is
rounded as it was: the output to its dtype, then the sum, so values are the same bits.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..fused_op import rows
from ..program import Argument, Program, ProgramBuilder
from ..surgery import sort_topologically
from .joint import depends, is_rows, outputs_of, program_of
from .restriction import copy_values

ADD = torch.ops.aten.add.Tensor
NAME = "added"


def absorb_sums(gm: fx.GraphModule) -> int:
    """Take sums into the fused ops that make one of their operands, in place; returns how many."""
    graph = gm.graph
    count = sum(_absorb(node, *operands) for node in list(graph.nodes) if (operands := _operands(node)))
    if count:
        sort_topologically(graph)
        graph.lint()
        gm.recompile()
    return count


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The fused op's output, which nothing else reads, and the other operand of a sum that can be taken in."""
    if node.op != "call_function" or node.target is not ADD or len(node.args) != 2 or node.kwargs:
        return None
    for result, other in (node.args, node.args[::-1]):
        if _is_own(result) and isinstance(other, fx.Node) and _alike(node, result, other) and not depends(other, result.args[0]):
            return result, other
    return None


def _is_own(node: Any) -> bool:
    return (isinstance(node, fx.Node) and node.target is operator.getitem and is_rows(node.args[0]) and len(node.users) == 1
            and "val" in node.args[0].meta)  # type: ignore[union-attr]


def _alike(*nodes: fx.Node) -> bool:
    """Are these floating-point tensors of one shape and dtype, on one device."""
    values = [node.meta.get("val") for node in nodes]
    first = values[0]
    if not isinstance(first, Tensor) or not first.is_floating_point():
        return False
    return all(isinstance(v, Tensor) and (v.dtype, v.device, v.dim()) == (first.dtype, first.device, first.dim())
               and all(statically_known_true(a == b) for a, b in zip(v.shape, first.shape, strict=True)) for v in values)


def _absorb(node: fx.Node, result: fx.Node, other: fx.Node) -> bool:
    op, index = result.args
    program = with_sum(program_of(op), index)
    if program is None:
        return False
    graph = node.graph
    with graph.inserting_before(node):
        fused = graph.call_function(rows, ([*op.args[0], other], str(program)))
    # What Inductor notes of operands, to keep their strides, is of the old ones.
    fused.meta = {key: fact for key, fact in op.meta.items() if key != "eager_input_vals"}
    for position, output in outputs_of(op).items():
        with graph.inserting_after(fused):
            fresh = graph.call_function(operator.getitem, (fused, position))
        fresh.meta = dict(output.meta)
        (node if output is result else output).replace_all_uses_with(fresh)
    for old in (node, *outputs_of(op).values(), op):
        graph.erase_node(old)
    return True


@lru_cache(maxsize=1024)
def with_sum(program: Program, index: int) -> Program | None:
    """The program with an argument more, of the shape and dtype of an output, that is added to it. None where an output is
    itself a sum over rows, or has no columns."""
    output, name = program.outputs[index], NAME
    if output.sums_rows or not all(output.rows) or output.columns is None:
        return None
    while name in program.argument_index:
        name += "_"
    builder = ProgramBuilder(program.rank, program.math, dict(program.axes))
    renumbered = copy_values(program, builder, {value for o in program.outputs for value, _ in o.stores}, {})
    for position, o in enumerate(program.outputs):
        stores = tuple((renumbered[value], lane) for value, lane in o.stores)
        if position == index:
            stores = tuple((builder.apply("add", builder.cast(o.dtype, value), builder.load(name, lane)), lane)
                           for value, lane in stores)  # fmt: skip
        builder.output(o.name, o.dtype, o.rows, o.columns, stores)
    builder.arguments += [*program.arguments, Argument(name, output.dtype, output.rows, output.columns)]
    built = builder.build()
    return replace(built, arguments=tuple(builder.arguments), axes=program.axes).verify()
