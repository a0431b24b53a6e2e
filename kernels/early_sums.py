"""Sums along a row that need not wait for other sums: ``sum(a - c b) = sum(a) - c sum(b)`` where c is a sum itself.

The backward of a LayerNorm subtracts the mean of a difference of which one term is scaled by another sum over the row. As it stands
the row is summed twice, one after the other; taken apart, all sums are known after one walk along the row. Only terms are taken
apart whose factors are not known before: what is added up first stays as it is, with its own cancellations.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from fxfuse.dataflow import Dataflow
from fxfuse.kernels.splitting import only_needed
from fxfuse.program import Program, ProgramBuilder

MOST_TERMS = 3


class Term(NamedTuple):
    """``sign * product(factors) * value``: factors have no columns, the value has."""

    sign: int
    factors: tuple[int, ...]
    value: int


def with_early_sums(program: Program) -> Program:
    """The same program, with fewer sums that wait for sums; itself if there are none."""
    flow = Dataflow(program)
    apart = {v: terms for v in flow.live if (terms := _terms_of_sum(program, flow, v)) is not None}
    if not apart:
        return program
    builder = ProgramBuilder(program.rank, program.math)
    new: list[int] = []
    for v, node in enumerate(program.nodes):
        if v in apart:
            new.append(_added_up(builder, [(t.sign, [new[f] for f in t.factors], new[t.value]) for t in apart[v]], node.attributes[0]))
        else:
            new.append(builder.node(replace(node, operands=tuple(new[o] for o in node.operands))))
    outputs = tuple(replace(o, stores=tuple((new[value], lane) for value, lane in o.stores)) for o in program.outputs)
    return only_needed(replace(program, nodes=tuple(builder.nodes), outputs=outputs)).verify()


def _added_up(b: ProgramBuilder, terms: list[tuple[int, list[int], int]], axis: str) -> int:
    total: int | None = None
    for sign, factors, value in terms:
        part = b.reduce("sum", axis, value)
        for factor in factors:
            part = b.apply("mul", factor, part)
        if total is None:
            total = part if sign > 0 else b.apply("neg", part)
        else:
            total = b.apply("add" if sign > 0 else "sub", total, part)
    assert total is not None
    return total


def _terms_of_sum(program: Program, flow: Dataflow, v: int) -> list[Term] | None:
    """The terms of a sum that waits for another, if none of them does."""
    node = program.nodes[v]
    if node.op != "sum" or v in flow.gathers or v in flow.online or flow.depth[v] < 2:
        return None
    terms = _terms(program, flow, node.operands[0])
    return terms if terms is not None and len(terms) <= MOST_TERMS else None


def _terms(program: Program, flow: Dataflow, v: int) -> list[Term] | None:
    """A value with columns as terms whose own values wait for no sum; None: it is no such thing."""
    if program.extents[v].axis is None:
        return None
    if flow.depth[v] == 0:
        return [Term(1, (), v)]
    node = program.nodes[v]
    if node.op in ("add", "sub"):
        first, second = (_terms(program, flow, operand) for operand in node.operands)
        if first is None or second is None:
            return None
        return first + [t._replace(sign=-t.sign) if node.op == "sub" else t for t in second]
    if node.op == "neg":
        inner = _terms(program, flow, node.operands[0])
        return None if inner is None else [t._replace(sign=-t.sign) for t in inner]
    if node.op == "mul":
        for factor, other in (node.operands, node.operands[::-1]):
            if program.extents[factor].axis is None:
                inner = _terms(program, flow, other)
                return None if inner is None else [t._replace(factors=(*t.factors, factor)) for t in inner]
    return None
