"""Programs that one kernel does not run as they are, as programs that one kernel does.

A *partial sum* (over some leading dimensions, not all: the gradient of a rotary table shared by heads) is computed unsummed and then
summed by torch. A program with *long rows and sums over rows* becomes two: the rows first, with the row statistics that the sums
need among the outputs; then the sums, which need no reduction along the row any more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fxfuse.dataflow import Dataflow
from fxfuse.program import Argument, Node, Output, Program


@dataclass(frozen=True)
class PartialSum:
    """Output ``index`` of the unsummed program is to be summed over ``dims`` and rounded to ``dtype``."""

    index: int
    dims: tuple[int, ...]
    dtype: str


def without_partial_sums(program: Program) -> tuple[Program, tuple[PartialSum, ...]]:
    """The program with partially summed outputs left unsummed in the math dtype, and the sums that remain to be done."""
    outputs, sums = [], []
    for k, output in enumerate(program.outputs):
        if any(output.rows) and output.sums_rows:
            sums.append(PartialSum(k, tuple(d for d, kept in enumerate(output.rows) if not kept), output.dtype))
            output = replace(output, dtype=program.math, rows=(True,) * program.rank)
        outputs.append(output)
    return replace(program, outputs=tuple(outputs)), tuple(sums)


@dataclass(frozen=True)
class Split:
    """``rows`` computes the outputs with rows, and ``statistics`` after them; ``sums`` takes (arguments, statistics) and computes
    the summed outputs. ``order[k]``: output k of the program is output ``order[k][1]`` of rows (0) or sums (1)."""

    rows: Program
    sums: Program
    order: tuple[tuple[int, int], ...]


def split_sums(program: Program) -> Split:
    """Separates the outputs summed over rows from the others."""
    kept = [o for o in program.outputs if not o.sums_rows]
    summed = [o for o in program.outputs if o.sums_rows]
    flow = Dataflow(program)
    statistics = _statistics(program, flow, [value for output in summed for value, _ in output.stores])
    every_row = (True,) * program.rank
    new_outputs = [Output(f"stat{v}", program.math, every_row, None, ((v, None),)) for v in statistics]
    new_arguments = tuple(Argument(f"stat{v}", program.math, every_row, None) for v in statistics)
    nodes = tuple(Node("load", (), (f"stat{v}", None)) if v in statistics else node for v, node in enumerate(program.nodes))
    rows = only_needed(replace(program, outputs=(*kept, *new_outputs)))
    sums = only_needed(replace(program, arguments=(*program.arguments, *new_arguments), nodes=nodes, outputs=tuple(summed)))
    places = {o.name: (0, k) for k, o in enumerate(kept)} | {o.name: (1, k) for k, o in enumerate(summed)}
    return Split(rows, sums, tuple(places[o.name] for o in program.outputs))


def _statistics(program: Program, flow: Dataflow, roots: list[int]) -> list[int]:
    """The values without columns at which the computation of the roots can be cut so that no reduction remains below."""
    cut, todo, seen = set(), list(roots), set()
    while todo:
        v = todo.pop()
        if v in seen:
            continue
        seen.add(v)
        if program.extents[v].axis is None and flow.depth[v] > 0:
            cut.add(v)
        else:
            todo.extend(flow.needs(v))
    return sorted(cut)


def only_needed(program: Program) -> Program:
    """The program without values that no output needs. Arguments stay, in order: the caller passes them all."""
    alive = {value for output in program.outputs for value, _ in output.stores}
    for v in reversed(range(len(program.nodes))):
        if v in alive:
            alive.update(program.nodes[v].operands)
    new = {old: k for k, old in enumerate(sorted(alive))}
    nodes = tuple(replace(program.nodes[v], operands=tuple(new[o] for o in program.nodes[v].operands)) for v in sorted(alive))
    outputs = tuple(replace(o, stores=tuple((new[v], lane) for v, lane in o.stores)) for o in program.outputs)
    return replace(program, nodes=nodes, outputs=outputs)
