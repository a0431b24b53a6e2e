"""A linear and its loss become one op in the graph: views of the rows before it, sums of the rows after it.

    hidden -> views of its rows -> [rows, D] -.
    weight, bias -----------------------------+-> linear_loss -> losses [rows, 1] -> what read them
    labels, weights of rows -> [rows, 1] -----'               '-> their weighted sum -> what summed them
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from ..anchored import KEPT, describe
from ..canonical.facts import known_dtype, known_shape, static_size
from ..canonical.vocabulary import CAST, aten
from ..program import Program
from ..regions.region import OutputView, call
from ..residuals import plan_residuals
from ..surgery import erase_unused
from .lazy_output import LAZY_OUTPUTS, describe_output
from .match import LinearLoss, place_of_size
from .op import is_by_row, linear_loss
from .reading import guarded
from .tail import Tail, tail_of


@dataclass(frozen=True)
class Plan:
    """How one linear and its loss run.

    mode:    see op.py                          wanted: the operands whose gradient the op gives
    program: over rows in one dimension; with the statistics that the backward reads, in mode "recompute"
    tail:    in mode "total", what sums the rows
    """

    mode: str
    wanted: tuple[str, ...]
    program: Program
    tail: Tail | None = None


def plan_of(found: LinearLoss, differentiable: Collection[fx.Node]) -> Plan:
    """The cheapest mode that has all gradients."""
    wanted = tuple(name for name, node in found.operands.items() if node in differentiable)
    program = guarded(one_dimensional(found.program), found.logits)
    if not wanted:
        return Plan("value", wanted, program)
    if len(found.losses()) == 1:
        tail = tail_of(found.region.outputs[0], differentiable)
        if tail is not None:
            return Plan("total", wanted, program, tail)
        if all(is_by_row(name) for name in wanted):
            return Plan("rows", wanted, program)
    return Plan("recompute", wanted, plan_residuals(program, (found.logits,)))


def one_dimensional(program: Program) -> Program:
    """The program over rows in one dimension; what varies over some of them is given for all."""
    return replace(
        program,
        rank=1,
        arguments=tuple(replace(a, rows=(any(a.rows),)) for a in program.arguments),
        outputs=tuple(replace(o, rows=(True,)) for o in program.outputs),
    )


def replace_linear_loss(graph: fx.Graph, found: LinearLoss, plan: Plan) -> dict[fx.Node, fx.Node]:
    """Put the op in place of the linear and the region. Returns what stands for each of the region's outputs now.

    The caller sorts the graph and erases what nothing uses.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    last = max((*found.region.nodes, *(plan.tail.nodes if plan.tail else ())), key=order.__getitem__)
    with graph.inserting_after(last):
        anchor = graph.call_function(linear_loss, ())
    with graph.inserting_before(anchor):
        hidden, sizes = _rows(graph, found, _in_dtype(graph, found, found.hidden))
        _take_sizes(found, sizes)
        weight, bias = _in_dtype(graph, found, found.weight), None if found.bias is None else _in_dtype(graph, found, found.bias)
        others = [_other(graph, found, plan.program, a.name, sizes) for a in plan.program.arguments if a.name != found.logits]
        row_weight = _row_weight(graph, plan.tail)
        lefts = [_rows(graph, found, term.left if term.wide else _in_dtype(graph, found, term.left))[0] for term in found.terms]
        rights = [term.right if term.wide else _in_dtype(graph, found, term.right) for term in found.terms]
    terms = (lefts, rights, [term.factor for term in found.terms])
    anchor.args = (hidden, weight, bias, others, row_weight, str(plan.program), found.logits, plan.mode, list(plan.wanted), *terms)
    describe(anchor, found.linear)
    values = _values(graph, anchor, plan)
    moved: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(list(values.values())[-1].next):
        rows = call(graph, found.linear, aten.sym_size.int, hidden, 0) if plan.tail is not None and plan.tail.mean else None
        shaped = {name: _shaped(graph, value, sizes) for name, value in values.items() if name != TOTAL}
        for view in found.region.outputs:
            if plan.tail is not None and view is found.region.outputs[0] and view.loss_reduction in (1, 2):
                result = _reduced(graph, view, values[TOTAL], [shaped[name] for name in view.names])
            else:
                result = view.insert(graph, [shaped[name] for name in view.names])
            _stand_in(view.node, result)
            moved[view.node] = result
        if plan.tail is not None and plan.tail.total is not None:
            result = plan.tail.finish(graph, values[TOTAL], rows)
            _stand_in(plan.tail.total, result)
            moved[plan.tail.total] = result
    replaced = [*found.members, *found.sizes, *(plan.tail.nodes if plan.tail else ())]
    erase_unused([*replaced, *values.values()])
    return moved


TOTAL = "total"


def give_up_outputs(gm: fx.GraphModule, lazy: Sequence[tuple[int, fx.Node]]) -> None:
    """Outputs that can be computed on demand become None; the graph's meta says how (before the surgery)."""
    described = [describe_output(gm, index, node) for index, node in lazy]
    gm.meta[LAZY_OUTPUTS] = [*gm.meta.get(LAZY_OUTPUTS, ()), *described]
    output = gm.graph.output_node()
    given = {index for index, _ in lazy}
    results = list(output.args[0])  # type: ignore[arg-type]
    output.args = (type(output.args[0])(None if i in given else result for i, result in enumerate(results)),)  # type: ignore[operator, misc]


def _rows(graph: fx.Graph, found: LinearLoss, value: fx.Node) -> tuple[fx.Node, list[Any]]:
    """The rows of the hidden states (or of a term's left factor) as a matrix, and the sizes of the rows' dimensions."""
    columns = size_of(graph, value, -1)
    for view in found.views:
        args = view.args[1:]
        if view.target is aten.reshape.default:
            args = ([*view.args[1][:-1], columns],)  # type: ignore[index, misc]
        if view.target is not aten.clone.default:  # a copy of the logits is none of the hidden states
            value = call(graph, view, view.target, value, *args)
    sizes = [size_of(graph, value, i) for i in range(len(known_shape(value)) - 1)]
    return (value if len(sizes) == 1 else call(graph, found.linear, aten.reshape.default, value, [-1, columns])), sizes


def _take_sizes(found: LinearLoss, sizes: Sequence[Any]) -> None:
    """Sizes that were read off the logits are those of the hidden states' rows."""
    for size in found.sizes:
        place = place_of_size(found, size)
        assert place is not None  # the matcher asked
        here = lambda node, size=size, place=place: sizes[place] if node is size else node  # noqa: E731
        for user in list(size.users):
            user.args, user.kwargs = fx.map_arg(user.args, here), fx.map_arg(user.kwargs, here)


def size_of(graph: fx.Graph, node: fx.Node, dim: int) -> Any:
    """A size as a number where it is one, else as a node."""
    known = static_size(known_shape(node)[dim])
    return call(graph, node, aten.sym_size.int, node, dim % len(known_shape(node))) if known is None else known


def _in_dtype(graph: fx.Graph, found: LinearLoss, operand: fx.Node) -> fx.Node:
    """An operand in the dtype that the linear computes in: autocast leaves no casts in a graph."""
    dtype = known_dtype(found.linear)
    return operand if known_dtype(operand) == dtype else call(graph, found.linear, CAST, operand, dtype)


def _other(graph: fx.Graph, found: LinearLoss, program: Program, name: str, sizes: Sequence[Any]) -> fx.Node:
    """Another argument of the loss: a row for every row of hidden states, or one for all."""
    index = found.program.argument_index[name]
    value = found.region.arguments[index].insert(graph)
    if not program.argument(name).rows[0] or len(sizes) == 1:
        return value
    columns = size_of(graph, value, -1)
    if not all(found.program.arguments[index].rows):
        value = call(graph, found.linear, aten.expand.default, value, [*sizes, columns])
    return call(graph, found.linear, aten.reshape.default, value, [-1, columns])


def _row_weight(graph: fx.Graph, tail: Tail | None) -> fx.Node | None:
    weight = None if tail is None else tail.row_weight(graph)
    return None if weight is None else call(graph, weight, aten.unsqueeze.default, weight, -1)


def _values(graph: fx.Graph, anchor: fx.Node, plan: Plan) -> dict[str, fx.Node]:
    """Of the op's results those that the graph reads."""
    names = [o.name for o in plan.program.outputs] + ([TOTAL] if plan.mode == "total" else [])
    values: dict[str, fx.Node] = {}
    point = anchor
    for index, name in enumerate(names):
        with graph.inserting_after(point):
            point = values[name] = graph.call_function(operator.getitem, (anchor, index))
        point.meta = {key: value for key, value in anchor.meta.items() if key in KEPT}
        point.meta["example_value"] = anchor.meta["example_value"][index]
    return values


def _shaped(graph: fx.Graph, value: fx.Node, sizes: Sequence[Any]) -> fx.Node:
    """Numbers per row in the dimensions that the loss had."""
    return value if len(sizes) == 1 else call(graph, value, aten.reshape.default, value, [*sizes, 1])


def _reduced(graph: fx.Graph, view: OutputView, total: fx.Node, values: Sequence[fx.Node]) -> fx.Node:
    """A cross-entropy from the sum of its rows: divided by the number of those that count, if it is a mean."""
    if view.loss_reduction == 1:
        counted = call(graph, view.node, aten.sum.default, call(graph, view.node, aten.detach.default, values[1]))
        total = call(graph, view.node, aten.div.Tensor, total, counted)
    dtype = known_dtype(view.node)
    return total if known_dtype(total) == dtype else call(graph, view.node, CAST, total, dtype)


def _stand_in(node: fx.Node, result: fx.Node) -> None:
    result.meta = {**node.meta, **{key: value for key, value in result.meta.items() if key == "example_value"}}
    node.replace_all_uses_with(result)
