"""The row programs of one chunk: from logits to losses, and from logits to their own gradient.

All are derived from the loss's program. Where the gradient is wanted at once, losses and gradient are one program, which reads the
logits and writes the gradient in their place; the cotangent is then 1 for every row, or a weight of the row that is known before.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from ..algebra import Algebra, append_node
from ..dataflow import Dataflow
from ..derivation import cotangent_name, derive_backward
from ..memory.restriction import merged
from ..program import Lane, Program, ProgramBuilder
from ..residuals import saved_names


@lru_cache(maxsize=256)
def loss_and_gradient(program: Program, logits: str, weighted: bool) -> Program:
    """The program with one more output, the last: the gradient of the logits when the first output has cotangent 1.

    weighted: it has the cotangent that is the last argument, one real number a row.
    """
    first = program.outputs[0].name
    backward = derive_backward(program, (first,), (logits,))
    if not weighted:
        backward = with_constant(backward, cotangent_name(first), 1.0)
    union = merged(program, backward)
    assert union is not None  # one is derived from the other
    names = [a.name for a in program.arguments]
    known = {a.name: a for a in union.arguments}
    rest = [a for a in union.arguments if a.name not in names]
    return replace(union, arguments=(*(known[name] for name in names), *rest)).verify()


@lru_cache(maxsize=256)
def gradient_alone(program: Program, logits: str, cotangents: tuple[str, ...]) -> Program:
    """The gradient of the logits for cotangents of the named outputs; reads what statistics the forward stored."""
    return derive_backward(program, cotangents, (logits,), saved_names(program, (logits,)))


def with_constant(program: Program, argument: str, value: float) -> Program:
    """The program with an argument of one number a row replaced by a constant."""
    builder = ProgramBuilder(program.rank, program.math, dict(program.axes), list(program.arguments))
    algebra = Algebra(builder)
    renumbered: list[int] = []
    for node in program.nodes:
        operands = [renumbered[v] for v in node.operands]
        if node.op == "load" and node.attributes[0] == argument:
            renumbered.append(builder.const(value))
        elif node.op == "mul":
            renumbered.append(algebra.mul(*operands))  # which knows what 1 times x is
        else:
            renumbered.append(append_node(builder, node, operands))
    for output in program.outputs:
        stores = tuple((renumbered[v], lane) for v, lane in output.stores)
        builder.output(output.name, output.dtype, output.rows, output.columns, stores)
    return builder.build()


@lru_cache(maxsize=64)
def scaling(dtype: str, result: str, factor: str, by_row: bool) -> Program:
    """``result = x * g`` for x [n, c] and g one number, or one for each row; arithmetic in float32 or wider.

    0 stays 0 whatever g is: where all rows of a mean are ignored, g is 1/0 and eager's gradient is 0.
    """
    builder = ProgramBuilder(1)
    axis = builder.axis(None)
    builder.argument("x", dtype, (True,), axis)
    builder.argument("g", factor, (by_row,), None)
    x, zero = builder.load("x", Lane(axis)), builder.const(0.0)
    product = builder.apply("mul", x, builder.load("g", None))
    value = builder.apply("select", builder.apply("eq", x, zero), zero, product)
    builder.output("y", result, (True,), axis, ((value, Lane(axis)),))
    return builder.build()


@lru_cache(maxsize=256)
def in_place(program: Program, argument: str) -> bool:
    """May the last output lie where the argument lay, under the schedule "looped": nothing reads the argument after the walk that
    stores it. (Single elements of a row are gathered before that walk; the schedule has a barrier there.)
    """
    flow = Dataflow(program)
    written = max(flow.depth[value] for value, _ in program.outputs[-1].stores)
    reading = [v for v in flow.live if flow.is_reduction(v) or v in flow.gathers]
    of_argument = set(program.loads(argument))
    return all(
        flow.depth[v] - flow.is_reduction(v) <= written
        for v in reading
        if of_argument & set(_operands_below(program, v))
    )


def _operands_below(program: Program, value: int) -> set[int]:
    """The values with columns that a reduction reads directly, not through another reduction."""
    found: set[int] = set()
    pending = list(program.nodes[value].operands)
    while pending:
        current = pending.pop()
        if current not in found and program.extents[current].axis is not None:
            found.add(current)
            pending += program.nodes[current].operands
    return found
