"""Building a region's row program, on demand from its outputs.

``RowBuilder.value(node, columns)`` gives the SSA value of some columns of a node, asking its operands for the columns they
contribute: a slice shifts the request, a concatenation forwards it to one part, a pointwise operation passes it on. So a rotation
becomes arithmetic on lanes by itself. If a tensor turns out to be read both whole and by lanes (a norm followed by a rotation), the
program is built again with that tensor cut, and its row sums become sums over the lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..canonical.facts import known_dtype, known_shape, static_size, statically_one, tensor_inputs
from ..program import Lane, Program, ProgramBuilder
from . import operations as ops
from .lanes import Columns, Cut, NotLanes, cut_of, interleave, join, pieces, refine, restrict, whole
from .layout import Layout, operand_layout
from .region import ArgumentView, OutputView

_MAX_ROUNDS = 4


def build_program(
    members: Mapping[fx.Node, Layout], outputs: list[fx.Node], rank: int
) -> tuple[Program, list[ArgumentView], list[OutputView]]:
    """The row program of a region and the views of its arguments and outputs. Raises NotLanes when it is none."""
    cuts: dict[fx.Node, Cut] = {}
    for _ in range(_MAX_ROUNDS):
        rows = RowBuilder(members, outputs, rank, cuts)
        views = [rows.emit_output(i, node) for i, node in enumerate(outputs)]
        finer = rows.finer_cuts()
        if not finer:
            program = rows.builder.build()
            kept = {argument.name for argument in program.arguments}
            arguments = [view for name, view in rows.arguments.items() if name in kept]
            return program, arguments, views
        cuts = {**cuts, **finer}
    raise NotLanes("the lanes of the last dimension do not settle")


@dataclass
class RowBuilder:
    """One building of one program; the operations table calls back into it."""

    members: Mapping[fx.Node, Layout]
    outputs: list[fx.Node]
    rank: int
    cuts: Mapping[fx.Node, Cut]
    builder: ProgramBuilder = field(init=False)
    arguments: dict[str, ArgumentView] = field(default_factory=dict)
    _names: dict[ArgumentView, str] = field(default_factory=dict)
    _values: dict[tuple[fx.Node, Columns | None], int] = field(default_factory=dict)
    _axes: dict[object, str] = field(default_factory=dict)
    _requested: dict[fx.Node, set[Columns]] = field(default_factory=dict)
    _node_cuts: dict[fx.Node, Cut] = field(default_factory=dict)

    def __post_init__(self) -> None:
        externals = [o for n in self.members for o in tensor_inputs(n) if o not in self.members]
        wide = any(known_dtype(node) == torch.float64 for node in externals)
        self.math = "float64" if wide else "float32"
        self.builder = ProgramBuilder(self.rank, self.math)

    # What the operations table uses.

    def apply(self, function: str, *operands: int) -> int:
        return self.builder.apply(function, *operands)

    def const(self, value: float | bool) -> int:
        return self.builder.const(value)

    def cast(self, dtype: torch.dtype, value: int) -> int:
        name = str(dtype).removeprefix("torch.")
        return self.builder.cast(name, value) if dtype.is_floating_point else value

    def real(self, x: Any, columns: Columns | None) -> int:
        """The real value of a node or number."""
        if isinstance(x, fx.Node):
            value = self.value(x, columns)
            return value if known_dtype(x).is_floating_point else self.apply("real", value)
        if isinstance(x, (bool, int, float)):
            return self.const(float(x))
        raise NotLanes(f"a number is only known at run time ({x})")

    def integer(self, x: fx.Node) -> int:
        return self.value(x, None)

    def truth(self, x: Any, columns: Columns | None) -> int:
        if isinstance(x, bool):
            return self.const(x)
        value = self.value(x, columns)
        if known_dtype(x) == torch.bool:
            return value
        zero = self.const(0.0) if known_dtype(x).is_floating_point else self.const(0)
        return self.apply("ne", value, zero)

    def comparable(self, a: Any, b: Any, columns: Columns | None) -> tuple[int, int]:
        """Both operands of a comparison in one kind: int when both are, else real."""

        def is_int(x: Any) -> bool:
            return (
                isinstance(x, int)
                if not isinstance(x, fx.Node)
                else not known_dtype(x).is_floating_point and known_dtype(x) != torch.bool
            )

        if is_int(a) and is_int(b):
            return tuple(self.value(x, columns) if isinstance(x, fx.Node) else self.const(x) for x in (a, b))  # type: ignore
        return self.real(a, columns), self.real(b, columns)

    def width(self, x: fx.Node) -> int:
        """The number of columns of a node, as a value."""
        total: int | None = None
        for piece in self._pieces(x):
            width = self.builder.width(self._axis(x, piece))
            total = width if total is None else self.apply("add", total, width)
        assert total is not None
        return total

    def row_sum(self, term: Callable[[Columns], int], x: fx.Node) -> int:
        """Sum of ``term`` over all columns of x, lane by lane."""
        total: int | None = None
        for piece in self._pieces(x):
            part = self.builder.reduce("sum", self._axis(x, piece), term(piece))
            total = part if total is None else self.apply("add", total, part)
        assert total is not None
        return total

    def whole_row(self, kind: str, x: fx.Node) -> int:
        return self.builder.reduce(kind, self.whole_axis(x), self.real(x, self.whole_lane(x)))

    def whole_lane(self, x: fx.Node) -> Columns:
        found = self._pieces(x)
        if len(found) != 1:
            raise NotLanes("a maximum or logsumexp runs over a row that other operations take apart")
        return found[0]

    def whole_axis(self, x: fx.Node) -> str:
        return self._axis(x, self.whole_lane(x))

    # Values.

    def value(self, node: fx.Node, columns: Columns | None) -> int:
        """The value of some columns of a node (None: the node has no columns, or a single broadcast one)."""
        if columns is not None and self._is_single_column(node):
            columns = None
        key = (node, columns)
        if key not in self._values:
            value = self._member(node, columns) if node in self.members else self._load(node, columns)
            if node in self.outputs and any(user in self.members for user in node.users):
                value = self.cast(known_dtype(node), value)  # what is used inside is what is stored
            self._values[key] = value
        return self._values[key]

    def _is_single_column(self, node: fx.Node) -> bool:
        shape = known_shape(node)
        if node in self.members:
            return not self.members[node].column or statically_one(shape[-1])
        return len(shape) == 0 or statically_one(shape[-1])

    def _member(self, node: fx.Node, columns: Columns | None) -> int:
        target, args = node.target, node.args
        if target in ops.POINTWISE:
            return ops.POINTWISE[target](self, columns, *args, **node.kwargs)
        if target in ops.REDUCTIONS:
            return ops.REDUCTIONS[target](self, *args)
        if target in ops.VIEWS:
            return (
                self._interleaved(node, columns)
                if self._flattens_pairs(node)
                else self.value(args[0], columns)
            )
        if target is ops.SLICE and columns is not None:
            return self.value(args[0], columns.within(_slice_columns(node)))
        if target is ops.CAT and columns is not None:
            return self._concatenated(node, columns)
        if target is ops.REPEAT and columns is not None:
            times = int(args[1])
            if columns.stride % times:
                raise NotLanes("a repeated column is read across its copies")
            return self.value(
                args[0], Columns(columns.offset // times, columns.stride // times, columns.width)
            )
        builder = ops.ROW_MACROS.get(target)
        if builder is None:
            raise NotLanes(f"{target} cannot be cut into columns")
        return builder(self, columns, *args)

    def _concatenated(self, node: fx.Node, columns: Columns) -> int:
        start = 0
        for part in node.args[0]:
            width = static_size(known_shape(part)[-1])
            if width is None or columns.width is None:
                raise NotLanes("a concatenation has a symbolic width")
            if start <= columns.offset < start + width:
                if columns.offset + columns.stride * (columns.width - 1) >= start + width:
                    raise NotLanes("a lane runs over two parts of a concatenation")
                return self.value(part, Columns(columns.offset - start, columns.stride, columns.width))
            start += width
        raise NotLanes("a lane lies outside a concatenation")

    def _flattens_pairs(self, node: fx.Node) -> bool:
        source = node.args[0]
        return source in self.members and self.members[source].paired

    def _interleaved(self, node: fx.Node, columns: Columns | None) -> int:
        parts = node.args[0].args[0]
        if columns is None or columns.stride % len(parts):
            raise NotLanes("interleaved columns are read across their pairs")
        part = parts[columns.offset % len(parts)]
        return self.value(
            part, Columns(columns.offset // len(parts), columns.stride // len(parts), columns.width)
        )

    def _load(self, node: fx.Node, columns: Columns | None) -> int:
        view = self._view(node)
        if view not in self._names:
            self._names[view] = f"a{len(self._names)}"
            self.arguments[self._names[view]] = view
        name = self._names[view]
        lane = None
        if columns is not None:
            self._requested.setdefault(node, set()).add(columns)
            lane = Lane(self._axis(node, columns), columns.offset, columns.stride)
        self._declare(name, node, view, lane)
        return self.builder.load(name, lane)

    def _declare(self, name: str, node: fx.Node, view: ArgumentView, lane: Lane | None) -> None:
        if any(argument.name == name for argument in self.builder.arguments):
            return
        size = static_size(known_shape(node)[-1]) if lane is not None else None
        axis_covers = lane is not None and (size is None or self.builder.axes[lane.axis] == size)
        covers = lane is not None and axis_covers and lane.offset == 0 and lane.stride == 1
        columns = None if lane is None else lane.axis if covers else size
        rows = tuple(d in view.layout.covered for d in range(self.rank))
        self.builder.argument(name, str(known_dtype(node)).removeprefix("torch."), rows, columns)

    def _view(self, node: fx.Node) -> ArgumentView:
        """How this region looks at an outer tensor: by the first member that uses it (all must agree)."""
        layouts = {
            operand_layout(user, self.members[user], node) for user in node.users if user in self.members
        }
        layouts = {layout for layout in layouts}
        if len(layouts) > 1:
            columnar = {layout for layout in layouts if layout.column}
            if len(columnar) != 1 or any(layout.dims != next(iter(columnar)).dims for layout in layouts):
                raise NotLanes("an outer tensor is used in two orders of its dimensions")
            layouts = columnar
        return ArgumentView(node, next(iter(layouts)), self.rank)

    def _axis(self, node: fx.Node, columns: Columns) -> str:
        """Axes are told apart by their width: lanes of one width are worked on side by side."""
        key = columns.width if columns.width is not None else str(known_shape(node)[-1])
        if key not in self._axes:
            self._axes[key] = self.builder.axis(columns.width)
        return self._axes[key]

    # Cuts.

    def _pieces(self, node: fx.Node) -> list[Columns]:
        return pieces(self._cut(node), static_size(known_shape(node)[-1]))

    def _cut(self, node: fx.Node) -> Cut:
        if node not in self._node_cuts:
            self._node_cuts[node] = self._member_cut(node) if node in self.members else self.cuts.get(node)
        return self._node_cuts[node]

    def _member_cut(self, node: fx.Node) -> Cut:
        target, args = node.target, node.args
        if target is ops.CAT:
            return join([(self._cut(part), _width(part)) for part in args[0]])
        if target is ops.REPEAT:
            return interleave([(self._cut(args[0]), _width(args[0]))] * int(args[1]))
        if target in ops.VIEWS:
            if self._flattens_pairs(node):
                return interleave([(self._cut(part), _width(part)) for part in args[0].args[0]])
            return self._cut(args[0])
        if target is ops.SLICE:
            return restrict(self._cut(args[0]), _slice_columns(node))
        cut: Cut = None
        for operand in tensor_inputs(node):
            shape = known_shape(operand)
            if not self._is_single_column(operand) and shape and static_size(shape[-1]) is not None:
                if static_size(shape[-1]) == static_size(known_shape(node)[-1]):
                    cut = refine(cut, self._cut(operand))
        return cut

    def finer_cuts(self) -> dict[fx.Node, Cut]:
        """Outer tensors that were read by lanes that overlap without being equal, with the cut that makes them disjoint."""
        finer = {}
        for node, lanes in self._requested.items():
            width = static_size(known_shape(node)[-1])
            if width is None or len(lanes) < 2:
                continue
            columns = [
                c
                for lane in lanes
                for c in range(lane.offset, lane.offset + lane.stride * (lane.width or 0), lane.stride)
            ]
            if len(set(columns)) != len(columns):
                finer[node] = refine(self.cuts.get(node), cut_of(lanes, width))
        return finer

    # Outputs.

    def emit_output(self, index: int, node: fx.Node) -> OutputView:
        """Declare the program output(s) of one graph node and say how the node is recovered from them."""
        layout, name = self.members[node], f"y{index}"
        dtype = str(known_dtype(node)).removeprefix("torch.")
        rows = (True,) * self.rank
        if node.target is ops.CROSS_ENTROPY:
            return self._emit_loss(node, name, layout)
        if self._is_single_column(node):
            self.builder.output(name, dtype, rows, None, ((self.value(node, None), None),))
            return OutputView(node, layout, (name,))
        found = self._pieces(node)
        stores = tuple(
            (self.value(node, piece), Lane(self._axis(node, piece), piece.offset, piece.stride))
            for piece in found
        )
        columns = self._axis(node, found[0]) if len(found) == 1 else static_size(known_shape(node)[-1])
        self.builder.output(name, dtype, rows, columns, stores)
        return OutputView(node, layout, (name,))

    def _emit_loss(self, node: fx.Node, name: str, layout: Layout) -> OutputView:
        logits, labels, _, reduction, ignore_index, smoothing = node.args
        loss, counted = ops.token_losses(self, logits, labels, int(ignore_index), float(smoothing))
        rows = (True,) * self.rank
        dtype = "float64" if self.math == "float64" else "float32"
        self.builder.output(name, dtype, rows, None, ((loss, None),))
        names: tuple[str, ...] = (name,)
        if reduction == 1:
            names = (name, f"{name}_counted")
            self.builder.output(names[1], dtype, rows, None, ((counted, None),))
        return OutputView(node, layout, names, loss_reduction=int(reduction))


def _width(node: fx.Node) -> int:
    width = static_size(known_shape(node)[-1])
    if width is None:
        raise NotLanes("a symbolic width would have to be cut")
    return width


def _slice_columns(node: fx.Node) -> Columns:
    """The columns of its operand that a slice of the last dimension takes."""
    source_width, width = _width(node.args[0]), _width(node)
    start = int(node.args[2] or 0) if len(node.args) > 2 else 0
    step = int(node.args[4]) if len(node.args) > 4 else 1
    start = start + source_width if start < 0 else start
    return Columns(min(start, source_width), step, width)


__all__ = ["RowBuilder", "build_program", "whole"]
