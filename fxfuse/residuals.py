"""What a fused forward saves for its backward: a minimum cut between what lives and what the backward reads.

Every forward value is either saved or computed again in registers from values that are. Saved can be: an argument, an output,
or a statistic, one number a row (rstd, logsumexp), which the forward then stores as an extra output ``s_<k>``. Each costs its
bytes; a parameter costs nothing, and a row reduction is never computed twice. The cheapest set that the backward can be computed
from is a minimum cut (networkx) in the graph of the forward's values:

    argument or reduction --> value --> value ... --> what the arithmetic of the backward reads
                               '-- capacity: bytes to save it; without limit where it cannot be saved

The choice is a function of the program and of what is wanted alone, so the op and its derivative agree on it without being told.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import networkx as nx

from .derivation import values_read
from .program import REAL_DTYPES, REDUCTIONS, Argument, Output, Program

STATISTIC = "s_"
# Sizes the program does not know: columns of a run-time axis, the part of its rows that a broadcast operand has.
RUN_TIME_WIDTH = 1024
BROADCAST_SHARE = 1 / 16
DTYPE_BYTES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "bool": 1}
# Capacities are integers, so that the cut is exact: millibytes a row, with room below for preferences.
UNIT = 1000
_SOURCE, _SINK = "source", "sink"


@lru_cache(maxsize=1024)
def plan_residuals(program: Program, wanted: tuple[str, ...], lives: frozenset[str] = frozenset()) -> Program:
    """The forward with the statistics that its backward reads as extra outputs ``s_<k>``, in the dtype of the arithmetic.

    wanted: the arguments whose gradient is wanted; lives: arguments and outputs that something else saves anyway.
    """
    stored = {value for output in program.outputs for value, _ in output.stores}
    names = _fresh_names(program)
    statistics = [
        Output(next(names), program.math, (True,) * program.rank, None, ((value, None),))
        for value in sorted(_saved_values(program, wanted, _real_outputs(program), lives))
        if _is_statistic(program, value) and value not in stored
    ]
    return replace(program, outputs=(*program.outputs, *statistics)).verify() if statistics else program


def saved_names(program: Program, wanted: tuple[str, ...] | None = None, cotangents: tuple[str, ...] | None = None,
                lives: frozenset[str] = frozenset()) -> tuple[str, ...]:
    """The arguments and outputs that the backward of a program reads, in the program's order.

    ``derive_backward(program, cotangents, wanted, saved_names(program, wanted, cotangents))`` reads these and cotangents, nothing
    else. wanted: by default every real argument; cotangents: by default those of every real output that is no statistic.
    """
    wanted = tuple(a.name for a in program.arguments if a.kind == "real") if wanted is None else wanted
    saved = _saved_values(program, wanted, cotangents or _real_outputs(program), lives)
    loads = {program.nodes[value].attributes[0] for value in saved if program.nodes[value].op == "load"}
    outputs = [o.name for o in program.outputs
               if any(value in saved and _readable(program, o, value) for value, _ in o.stores)]
    return *(a.name for a in program.arguments if a.name in loads), *outputs


def _fresh_names(program: Program) -> Iterator[str]:
    taken = {a.name for a in program.arguments} | {o.name for o in program.outputs}
    return (name for k in range(len(program.nodes) + len(taken)) if (name := f"{STATISTIC}{k}") not in taken)


def _real_outputs(program: Program) -> tuple[str, ...]:
    """The outputs that can have a cotangent in first-order use."""
    return tuple(o.name for o in program.outputs if o.dtype in REAL_DTYPES and not o.name.startswith(STATISTIC))


def _is_statistic(program: Program, value: int) -> bool:
    """One real number a row."""
    extent = program.extents[value]
    return extent.row and extent.axis is None and program.kinds[value] == "real" and program.nodes[value].op != "load"


def _readable(program: Program, output: Output, value: int) -> bool:
    """Does an output hold the value itself, and not its sum over rows, nor the repetition of it over columns?"""
    lane = next(lane for stored, lane in output.stores if stored == value)
    return not output.sums_rows and (lane is None or program.extents[value].axis is not None)


def _row_bytes(program: Program, tensor: Argument | Output) -> float:
    """The bytes of a tensor for each row of the domain."""
    columns = program.width(tensor.columns) if isinstance(tensor.columns, str) else tensor.columns or 1
    share = 1.0 if all(tensor.rows) else BROADCAST_SHARE if any(tensor.rows) else 0.0
    return DTYPE_BYTES[tensor.dtype] * (RUN_TIME_WIDTH if columns is None else columns) * share


@lru_cache(maxsize=1024)
def _saved_values(program: Program, wanted: tuple[str, ...], cotangents: tuple[str, ...], lives: frozenset[str]) -> frozenset[int]:
    """The forward values that are saved; a load stands for its whole argument."""
    graph = nx.DiGraph()
    graph.add_nodes_from([_SOURCE, _SINK])
    capacities = _capacities(program, lives)
    pending = list(values_read(program, cotangents, wanted))
    for value in pending:
        graph.add_edge((value, "out"), _SINK)
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        node = program.nodes[value]
        _add_value(graph, value, capacities.get(value))
        if node.op == "load":
            _add_argument(graph, program, value, lives)
        elif node.op in REDUCTIONS and program.extents[value].row:
            graph.add_edge(_SOURCE, (value, "in"))
        else:
            for operand in node.operands:
                graph.add_edge((operand, "out"), (value, "in"))
                pending.append(operand)
    _, (_, after) = nx.minimum_cut(graph, _SOURCE, _SINK)
    saved = {value for value in seen if (value, "in") not in after and (value, "out") in after}
    loads = {value for value in seen if program.nodes[value].op == "load"}
    return frozenset(saved | {v for v in loads if ("argument", program.nodes[v].attributes[0]) in after})


def _add_value(graph: nx.DiGraph, value: int, capacity: int | None) -> None:
    """An edge from a value to its uses; without a capacity it cannot be cut."""
    if capacity is None:
        graph.add_edge((value, "in"), (value, "out"))
    else:
        graph.add_edge((value, "in"), (value, "out"), capacity=capacity)


def _add_argument(graph: nx.DiGraph, program: Program, load: int, lives: frozenset[str]) -> None:
    """The argument behind a load: saved once for all its lanes."""
    argument = program.argument(program.nodes[load].attributes[0])
    cost = 1.0 if argument.name in lives else UNIT * _row_bytes(program, argument)
    graph.add_edge(_SOURCE, ("argument", argument.name), capacity=1 + int(cost))
    graph.add_edge(("argument", argument.name), (load, "in"))


def _capacities(program: Program, lives: frozenset[str]) -> dict[int, int]:
    """What saving costs. Of equals: an output before an argument (the next layer reads it), the last statistic of a chain."""
    costs: dict[int, int] = {}
    for value in range(len(program.nodes)):
        if _is_statistic(program, value):
            costs[value] = UNIT * DTYPE_BYTES[program.math] + len(program.nodes) - value
    for output in program.outputs:
        for value, lane in output.stores:
            if program.nodes[value].op in ("load", "const") or not _readable(program, output, value):
                continue
            columns = output.columns if isinstance(output.columns, int) else None
            share = 1.0 if lane is None or columns is None else (program.width(lane.axis) or columns) / columns
            cost = 1.0 if output.name in lives else 0.99 * UNIT * share * _row_bytes(program, output)
            costs[value] = min(1 + int(cost), costs.get(value, 1 + int(cost)))
    return costs
