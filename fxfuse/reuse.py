"""Outputs of fused ops in the memory of operands that die there: a gate's gradient where the gate was.

Two proofs are needed, and a run-time check.

- Of the program: an output may lie where an argument lay if both have the same elements, each element of the output depends,
  pointwise, on the very element of the argument that it overwrites, and nothing else reads that element. Then whoever
  stores has loaded before, whatever the layout of threads.
- Of the graph: nothing after the op reads the operand or a view of it, it is not returned, and its memory belongs to the graph: a value
  that the graph computed, or one saved for this backward alone (no input or output of the forward lies in it).
- At run time: a saved tensor is reused only when the autograd graph is not kept and nobody else holds its memory
  (``lowering.py``); else the output gets memory of its own.

Only memory is saved by this; values are the same bits.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .dataflow import Dataflow
from .functions import FUNCTIONS
from .memory.joint import base_of, is_rows, is_view, outputs_of, program_of
from .products import calls
from .program import Lane, Program

DONATED = "fxfuse_donated"  # node.meta key of a backward graph's placeholder whose memory is nobody else's
FREE = "free"  # its value where whoever calls the graph has looked that nobody holds the memory, else True

# What makes new tensors: values of these are in memory of their own.
_FRESH = frozenset(
    overload
    for name in ("mm", "addmm", "bmm", "baddbmm", "add", "mul", "sub", "div", "neg", "sum", "cat", "clone")
    for overload in (getattr(getattr(torch.ops.aten, name), kind) for kind in getattr(torch.ops.aten, name).overloads())
    if not overload._schema.is_mutable
)

# These write into their first argument, or look at its memory, and return it.
IN_PLACE = (calls.columns, calls.thin_pair, calls.accumulate, calls.with_room, calls.beside, calls.below)


class Reuse(NamedTuple):
    """outputs: for each output of the program the operand whose memory it takes, or None. saved: operands that were saved for the
    backward, to be checked at run time."""

    outputs: tuple[int | None, ...]
    saved: tuple[int, ...]


@lru_cache(maxsize=4096)
def possible(program: Program) -> tuple[tuple[int, ...], ...]:
    """For each output the arguments (by position) in whose place it may be stored."""
    return tuple(
        tuple(
            position
            for position, argument in enumerate(program.arguments)
            if not output.sums_rows
            and all(argument.rows)
            and (argument.dtype, argument.columns) == (output.dtype, output.columns)
            and _overwrites_what_it_read(program, output.stores, argument.name)
        )
        for output in program.outputs
    )


def _overwrites_what_it_read(program: Program, stores: Sequence[tuple[int, Lane | None]], argument: str) -> bool:
    """Is each element stored by a value that depends pointwise on the argument's element at that place, the only load of it."""
    flow = Dataflow(program)
    if any(set(flow.column_part(gather.picked)[0]) & set(program.loads(argument)) for gather in flow.gathers.values()):
        return False  # a single element of a row is read again, at a place that only the data tells
    loads: dict[Lane | None, list[int]] = {}
    for value in program.loads(argument):
        loads.setdefault(program.nodes[value].attributes[1], []).append(value)
    lanes = [lane for _, lane in stores]
    if set(loads) != set(lanes) or len(set(lanes)) != len(lanes) or any(len(values) > 1 for values in loads.values()):
        return False
    return all(_depends_pointwise(program, value, loads[lane][0]) for value, lane in stores)


def _depends_pointwise(program: Program, value: int, load: int) -> bool:
    pending, seen = [value], set()
    while pending:
        current = pending.pop()
        if current == load:
            return True
        node = program.nodes[current]
        if current not in seen and (node.op == "cast" or node.op in FUNCTIONS):
            seen.add(current)
            pending += node.operands
    return False


def mark_donated(forward: fx.GraphModule, backward: fx.GraphModule, num_fwd_outputs: int) -> int:
    """Mark the backward's placeholders whose memory the forward made for the backward alone; returns how many."""
    results = list(forward.graph.output_node().args[0])
    returned = {node for node in results[:num_fwd_outputs] if isinstance(node, fx.Node)}
    saved = [node for node in results[num_fwd_outputs:] if isinstance(node, fx.Node)]
    own = set()
    for node in saved:
        root = root_of(node)
        aliases = set(aliases_of(root))
        if is_fresh(root) and not aliases & returned and sum(other in aliases for other in saved) == 1:
            own.add(node.name)
    marked = [node for node in backward.graph.nodes if node.op == "placeholder" and node.name in own]
    for node in marked:
        node.meta[DONATED] = True
    return len(marked)


def plan_reuse(graph: fx.Graph, wanted: Mapping[fx.Node, fx.Node] = MappingProxyType({})) -> dict[fx.Node, Reuse]:
    """For each fused op of a partitioned graph, which outputs take the memory of which operands.

    wanted: outputs that are to lie in the memory of certain nodes, which no other output takes
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    plans: dict[fx.Node, Reuse] = {}
    for node in graph.nodes:
        if is_rows(node) and "val" in node.meta:
            plan = _plan_op(node, order, wanted)
            if plan is not None:
                plans[node] = plan
    return plans


def _plan_op(node: fx.Node, order: dict[fx.Node, int], wanted: Mapping[fx.Node, fx.Node]) -> Reuse | None:
    program, operands, outputs = program_of(node), list(node.args[0]), outputs_of(node)
    dying = [i for i, operand in enumerate(operands) if _dies_at(operand, node, operands, order)]
    chosen: list[int | None] = [None] * len(program.outputs)
    options = possible(program)
    # Outputs with the fewest choices first, saved operands before others: what is saved is what fills memory.
    for index in sorted(range(len(options)), key=lambda i: len(options[i])):
        place = wanted.get(outputs[index]) if index in outputs else None
        fitting = [i for i in options[index] if i in dying and i not in chosen and _same_layout(node, index, operands[i])
                   and (root_of(operands[i]) is place or (place is None and root_of(operands[i]) not in wanted.values()))]
        if fitting:
            chosen[index] = min(fitting, key=lambda i: root_of(operands[i]).op != "placeholder")
    if not any(i is not None for i in chosen):
        return None
    return Reuse(tuple(chosen), tuple(i for i in chosen if i is not None and root_of(operands[i]).op == "placeholder"
                                      and root_of(operands[i]).meta.get(DONATED) != FREE))


def _dies_at(operand: fx.Node, node: fx.Node, operands: Sequence[fx.Node], order: dict[fx.Node, int]) -> bool:
    """Is this operation the last to look at the operand's memory, through this operand alone."""
    root = root_of(operand)
    if not (root.meta.get(DONATED) if root.op == "placeholder" else is_fresh(root)):
        return False
    if sum(root_of(other) is root for other in operands) > 1:
        return False
    return all(user is node or order[user] < order[node] for alias in aliases_of(root) for user in alias.users
               if not _is_alias(user, alias))


def aliases_of(root: fx.Node) -> Iterator[fx.Node]:
    """The node and all that may look at its memory."""
    yield root
    for user in root.users:
        if _is_alias(user, root):
            yield from aliases_of(user)


def root_of(node: fx.Node) -> fx.Node:
    """The node that made the memory in which this one lies."""
    base = base_of(node)
    while base.target in IN_PLACE and isinstance(base.args[0], fx.Node):
        base = base_of(base.args[0])
    return base


def _is_alias(user: fx.Node, of: fx.Node) -> bool:
    if user.target in IN_PLACE:
        return user.args[0] is of
    if is_view(user):
        return user.args[0] is of
    if user.target is operator.getitem:
        return not (is_rows(of) or _is_launch(of))
    schema = getattr(user.target, "_schema", None)
    return schema is not None and any(r.alias_info is not None for r in schema.returns)


def _is_launch(node: fx.Node) -> bool:
    return getattr(node.target, "__module__", "") == "fxfuse"


def is_fresh(root: fx.Node) -> bool:
    """Is a value in memory that this operation made."""
    if root.target is operator.getitem:
        return is_rows(root.args[0])
    return root.op == "call_function" and (root.target in _FRESH or root.target in (calls.product, calls.columns))


def _same_layout(node: fx.Node, index: int, operand: fx.Node) -> bool:
    """Do output and operand have the same shape and strides, as far as the trace knows (the launch looks again)."""
    output, value = node.meta["val"][index], operand.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() != output.dim() or value.dtype != output.dtype:
        return False
    return all(_known_equal(a, b) for a, b in zip((*value.shape, *value.stride()), (*output.shape, *output.stride()), strict=True))


def _known_equal(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    return statically_known_true(a == b)
