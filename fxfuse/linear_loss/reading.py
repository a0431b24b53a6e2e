"""Rows that do not read their logits: a label that is ignored makes a loss 0 whatever the logits are.

Which rows these are is in the program: a condition of the row (``label != -100``) by which everything that depends on the logits is
thrown away. A *guarded* program says it where it loads, ``select(condition, z, 0)``. Its outputs are the same numbers; what it saves
and its derivatives are finite in such rows whatever lies in the memory of their logits, and their gradient is 0, so that nobody needs
to compute them (selection.py).
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from ..algebra import append_node
from ..memory.restriction import copy_values
from ..program import Program, ProgramBuilder


class Condition(NamedTuple):
    """A row reads its logits only if the boolean ``value`` of the program is ``holds`` there."""

    value: int
    holds: bool


@lru_cache(maxsize=256)
def reading_condition(program: Program, logits: str) -> Condition | None:
    """What must hold for any output of a row to depend on its logits; None where all rows read them, or it is not known."""
    of_logits = _depending(program, logits)
    candidates = {node.operands[0] for node in program.nodes if node.op == "select"}
    for value in sorted(candidates):
        extent = program.extents[value]
        if value in of_logits or extent.axis is not None or not extent.row:
            continue
        for holds in (True, False):
            if not _outputs_need(program, of_logits, Condition(value, holds)):
                return Condition(value, holds)
    return None


@lru_cache(maxsize=256)
def guarded(program: Program, logits: str) -> Program:
    """The program with its logits replaced by 0 in rows that do not read them; itself where all do."""
    condition = reading_condition(program, logits)
    if condition is None or is_guarded(program, logits):
        return program
    builder = ProgramBuilder(program.rank, program.math, dict(program.axes), list(program.arguments))
    known = copy_values(program, builder, {condition.value}, {})[condition.value]
    zero = builder.const(0.0)
    renumbered: list[int] = []
    for node in program.nodes:
        value = append_node(builder, node, [renumbered[v] for v in node.operands])
        if node.op == "load" and node.attributes[0] == logits:
            value = builder.apply("select", known, *((value, zero) if condition.holds else (zero, value)))
        renumbered.append(value)
    for output in program.outputs:
        stores = tuple((renumbered[v], lane) for v, lane in output.stores)
        builder.output(output.name, output.dtype, output.rows, output.columns, stores)
    return replace(builder.build(), arguments=program.arguments, axes=program.axes).verify()


@lru_cache(maxsize=256)
def is_guarded(program: Program, logits: str) -> bool:
    """Are the logits of a row looked at behind its condition only."""
    condition = reading_condition(program, logits)
    loads = set(program.loads(logits))
    if condition is None:
        return False
    place = 1 if condition.holds else 2
    return all(
        node.op == "select" and node.operands[0] == condition.value and not loads.intersection(
            operand for k, operand in enumerate(node.operands) if k != place)
        for node in program.nodes if loads.intersection(node.operands)
    )


@lru_cache(maxsize=256)
def reading_rows(program: Program, logits: str) -> Program | None:
    """The program [rows, 1] of float32 that is 1 where a row reads its logits and 0 elsewhere; None where that is not known."""
    condition = reading_condition(program, logits)
    if condition is None:
        return None
    builder = ProgramBuilder(program.rank, program.math, dict(program.axes), list(program.arguments))
    known = copy_values(program, builder, {condition.value}, {})[condition.value]
    one, zero = builder.const(1.0), builder.const(0.0)
    reads = builder.apply("select", known, *((one, zero) if condition.holds else (zero, one)))
    builder.output("reads", "float32", (True,) * program.rank, None, ((reads, None),))
    return builder.build()


def _depending(program: Program, logits: str) -> set[int]:
    """The values that the logits go into."""
    found: set[int] = set()
    for i, node in enumerate(program.nodes):
        if (node.op == "load" and node.attributes[0] == logits) or found.intersection(node.operands):
            found.add(i)
    return found


def _outputs_need(program: Program, of_logits: set[int], condition: Condition) -> bool:
    """Does an output depend on the logits in a row where the condition is not met."""
    seen: set[int] = set()
    pending = [value for output in program.outputs for value, _ in output.stores]
    while pending:
        value = pending.pop()
        if value not in of_logits or value in seen:
            continue
        seen.add(value)
        node = program.nodes[value]
        if node.op == "load":
            return True
        if node.op == "select" and node.operands[0] == condition.value:
            pending.append(node.operands[2 if condition.holds else 1])
        else:
            pending += node.operands
    return False
