"""A wide product and thin ones as one matmul over a longer contraction, where that moves fewer bytes than adding to the result.

    x W + s h B   =   [x, h] [W; s B]

The result [M, N] is written once, where accumulation writes and reads it once more. That takes room beside x and W: a fused op
writes x, and a dequantization W, into wider rows; a frozen weight may have room of its own (roomy_weights.py); what has none is
copied. Whether this pays is a count of bytes (``gain``).

h is computed straight into its columns. Linears that share x share [x, h1, h2, h3]; each has zeros under the others' columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from ..memory.joint import is_rows, program_of
from ..quantized_op import is_dequantization
from ..reuse import plan_reuse
from ..roomy_weights import ALIGNED, is_promised, row_distance
from .accumulation import ADD, Ask, Sum, Tell, base_of, erase_unread, read_sum, unviewed
from .calls import OWN, below, beside, columns, with_room
from .check import agrees
from .stacking import STACKED, stacked
from .terms import RESHAPES, Term, is_tensor, made, matrix_source, read_product, size, tensor

aten = torch.ops.aten
# node.meta: of a fused op {output: (operand of its shape, columns left free, what for)}; of a dequantization (rows, columns)
ROOM = "fxfuse_room"
TAKEN = "fxfuse_room_taken"  # in node.meta of a weight whose own room a sum has taken
# A copied byte costs more than one that is written in order: on an H200 a copy of 8192 x 4096 took 39 us, and the product of that with
# 4096 x 14336 over 16 more 30 us longer; a step whose gradients were copied beside their thin terms was no faster.
COPY = 2.5
# What accumulation moves, of its two bytes for a byte of the result: one written in order, one read while the wide product computes, of
# which half is taken to be hidden.
ACCUMULATION = 1.25
LEAST = 1 << 22  # bytes below which launches count, and not bytes


def rooms_of(op: fx.Node) -> list[tuple[int, torch.dtype, int] | None]:
    """For each output of a fused op the room to leave beside it (lowering.py), or nothing where none has any."""
    asked = op.meta.get(ROOM)
    if not asked:
        return []
    values = op.meta["val"]
    return [(asked[i][0], values[i].dtype, asked[i][1]) if i in asked else None for i in range(len(values))]


@dataclass
class Plan:
    """One sum: ``wide`` takes in columns [start, start + R) of ``whole``, times alpha and ``rights`` [R, N], one under the other."""

    found: Sum
    wide: Term
    whole: fx.Node
    start: int
    rights: list[fx.Node]
    alpha: float
    room: int
    spacious: bool  # the left factor can be written with the room beside it
    bias: fx.Node | None = None


def augment_sums(graph: fx.Graph, validate: str, ask: Ask, tell: Tell) -> int:
    """In place; returns how many sums took their thin terms into a wide one."""
    count = 0
    going_by: set[fx.Node] = set()
    widened: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
    packed = {(op, i) for op, reuse in plan_reuse(graph).items() for i, place in enumerate(reuse.outputs) if place is not None}
    for node in reversed(list(graph.nodes)):  # larger sums first
        found = read_sum(node) if node.users else None
        if found is None or ask(found) or going_by.issuperset(term.node for term in found.terms):
            continue
        if found.thin and base_of(found, found.thin[0]) is not None:
            # What goes by is read where the thin term is written. Augmented, all of it or the rest of it would be one more sum, of
            # three passes.
            going_by.update(term.node for term in found.terms)
            continue
        plan = _plan(found, packed)
        if plan is None:
            continue
        reason = _Augmentation(plan, widened).place(validate)
        tell(plan.found, reason)
        count += not reason
    return count


def _plan(found: Sum, packed: set[tuple[Any, Any]]) -> Plan | None:
    """How the thin term of a sum could be taken in by a wide one, if that pays. ``packed``: outputs of fused ops (op, index) that
    take the memory of an operand, which has no room.
    """
    thin = sorted(found.thin, key=lambda term: _span(term)[1])
    biased = found.biased
    if (found.writable and biased is None) or not thin or tensor(found.node).dtype.itemsize != 2:
        return None
    whole, start, _ = _span(thin[0])
    if any(_span(b)[:2] != (whole, _span(a)[2]) for a, b in pairwise(thin)) or len({t.alpha for t in thin}) > 1:
        return None
    room, columns_out = size(whole, 1), size(thin[0].right, 1)
    if room is None or columns_out is None or room % ALIGNED or not list(_writers(whole)):
        return None
    best, most, spacious = None, 0.0, False
    for wide in [*found.wide, *([biased] if biased else [])]:
        if (wide is biased or read_product(wide.node) is not None) and wide.alpha == 1.0 and _aligned(wide):
            free = has_room(wide.left, whole) and unviewed(wide.left).args[:2] not in packed
            roomy = bool(_room_of_weight(wide.right, room))
            gained = gain(_hint(wide.left, 0), size(wide.left, 1) or 0, columns_out, room, free, roomy)
            if gained > most:
                best, most, spacious = wide, gained, free
    if best is None:
        return None
    bias: Any = best.node.args[0] if best is biased else None
    return Plan(found, best, whole, start, [t.right for t in thin], thin[0].alpha, room, spacious, bias)


def _span(term: Term) -> tuple[fx.Node, int, int]:
    """The matrix that a left factor is columns of, and which."""
    return term.left.meta.get(STACKED, (term.left, 0, size(term.left, 1) or 0))


def gain(rows: int, contraction: int, columns_out: int, room: int, left_has_room: bool, right_has_room: bool) -> float:
    """Bytes (16-bit numbers) that are not moved, by what moving them costs: those of adding to the result, less those of the copies
    that are needed."""
    added = ACCUMULATION * 2 * rows * columns_out
    copied = 0 if left_has_room else 4 * rows * contraction
    copied += 0 if right_has_room else 4 * contraction * columns_out
    longer = 2 * room * (rows + columns_out)
    return added - COPY * copied - longer if added >= LEAST else 0.0


def _hint(node: fx.Node, dim: int) -> int:
    found = tensor(node).shape[dim]
    return found if isinstance(found, int) else int(found.node.hint)


def _aligned(wide: Term) -> bool:
    sizes = size(wide.left, 1), size(wide.right, 1)
    return all(s is not None and s % ALIGNED == 0 for s in sizes)


def has_room(left: fx.Node, whole: fx.Node) -> bool:
    """Can the fused op that makes this matrix leave columns free beside it for another; nothing else minds how its rows lie."""
    source = unviewed(left)
    if not _is_output(source):
        return False
    op: fx.Node = source.args[0]  # type: ignore[assignment]
    known = op.meta.get(ROOM, {}).get(source.args[1])
    if known is not None:
        return known[2] is whole  # one matrix has the place beside it
    program = program_of(op)
    output = program.outputs[source.args[1]]  # type: ignore[index]
    if any(o.sums_rows for o in program.outputs) or output.columns is None or not all(output.rows):
        return False
    return _like(op, source) is not None and all(_reads_rows(user) for user in _readers(source))


def _free_columns(matrix: fx.Node, room: int) -> int:
    """Columns to leave free beside a matrix for so many: its rows may be further apart than that."""
    columns = size(matrix, 1)
    assert columns is not None  # (as ``_aligned`` has seen)
    return row_distance(columns, room) - columns


def _like(op: fx.Node, output: fx.Node) -> int | None:
    """An operand of a fused op that has the shape of its output."""
    known = torch.fx.experimental.symbolic_shapes.statically_known_true
    for i, operand in enumerate(op.args[0]):  # type: ignore[arg-type]
        if is_tensor(operand) and tensor(operand).dim() == tensor(output).dim() and tensor(operand).is_contiguous() and all(
                known(a == b) for a, b in zip(tensor(operand).shape, tensor(output).shape, strict=True)):
            return i
    return None


def _is_output(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and bool(node.args) and is_rows(node.args[0]) \
        and isinstance(node.args[1], int)


def _keeps_columns(node: fx.Node) -> bool:
    known = torch.fx.experimental.symbolic_shapes.statically_known_true
    return known(tensor(node).shape[-1] == tensor(node.args[0]).shape[-1])  # type: ignore[arg-type]


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """What reads a matrix, through views that keep its columns."""
    for user in node.users:
        if user.target in RESHAPES and _keeps_columns(user):
            yield from _readers(user)
        else:
            yield user


def _reads_rows(user: fx.Node) -> bool:
    """Does an operation take a matrix whatever the distance of its rows; a value that is kept or returned should not hold the room."""
    return read_product(user) is not None or user.target in (aten.t.default, aten.addmm.default, columns, with_room)


def _room_of_weight(right: fx.Node, room: int) -> bool | str:
    """Is there room beside (or, for an untransposed factor, below) a weight: what makes it can leave some, or it has its own, beside
    it, which nothing else in this graph writes to."""
    across = right.target is aten.t.default
    weight: fx.Node = right.args[0] if across else right  # type: ignore[assignment]
    if is_dequantization(weight):
        return len(weight.users) == 1 and ROOM not in weight.meta
    own = across and weight.op == "placeholder" and TAKEN not in weight.meta and is_promised(tensor(weight), room)
    return OWN if own else False


def _writers(whole: fx.Node) -> Iterator[tuple[fx.Node, fx.Node, float, int]]:
    """The thin products that make a matrix: (left, right, alpha, first column)."""
    term = read_product(whole)
    if term is not None:
        yield term.left, term.right, term.alpha, 0
    elif whole.target is columns:
        buffer, left, right, alpha, start, _ = whole.args
        if isinstance(buffer, fx.Node):
            yield from _writers(buffer)
        yield left, right, alpha, start  # type: ignore[misc]


class _Augmentation:
    """One sum on its way into one matmul. ``known``: the widened left factors of this graph."""

    def __init__(self, plan: Plan, known: dict[tuple[fx.Node, fx.Node], fx.Node]) -> None:
        self.plan, self.known = plan, known
        self.node, self.graph = plan.found.node, plan.found.node.graph
        # With a bias, what the sum writes over is the wide product itself.
        self.others = [] if plan.bias is not None else plan.found.others
        self.fresh: list[fx.Node] = []

    def place(self, validate: str) -> str:
        plan = self.plan
        key = (unviewed(plan.wide.left), plan.whole)
        left = self.known.get(key)
        if left is None:
            with self.graph.inserting_before(plan.whole):
                left = self._left()
        with self.graph.inserting_before(self.node):
            factors = (left, self._right())
            product = (self._made(aten.mm.default, factors, tensor(plan.wide.node)) if plan.bias is None else
                       self._made(aten.addmm.default, (plan.bias, *factors), tensor(plan.wide.node)))
            result = self._sum(product)
        leaves = [leaf for term in (*plan.found.wide, plan.wide) for leaf in (term.left, matrix_source(term.right))]
        leaves += [leaf for a, b, _, _ in _writers(plan.whole) for leaf in (a, matrix_source(b))]
        leaves += [*map(matrix_source, plan.rights), *self.others, *([] if plan.bias is None else [plan.bias])]
        verdict = agrees([self.node], [result], list(dict.fromkeys(leaves)), gradients=False, mode=validate)
        if verdict.reason:
            for node in reversed(self.fresh):
                self.graph.erase_node(node)
            return verdict.reason
        self._plan_room()
        self.node.replace_all_uses_with(result)
        erase_unread(self.node)
        if key not in self.known:
            self.known[key] = left
            self._move_whole(left)
        return ""

    def _made(self, target: Any, args: tuple, value: Any) -> fx.Node:
        self.fresh.append(made(target, args, value, self.plan.wide.node))
        return self.fresh[-1]

    def _left(self) -> fx.Node:
        """[x, h], with h written in its place."""
        plan, x = self.plan, self.plan.wide.left
        width = tensor(x).shape[1]
        value = tensor(x).new_empty((tensor(x).shape[0], width + plan.room))
        wide = self._made(with_room, (x, plan.room, plan.spacious), value)
        for left, right, alpha, start in _writers(plan.whole):
            wide = self._made(columns, (wide, left, right, alpha, width + start, width + plan.room), value)
        return wide

    def _right(self) -> fx.Node:
        """[W; s B] as W lies in memory."""
        plan, right = self.plan, self.plan.wide.right
        self.planned = planned = _room_of_weight(right, plan.room)
        rows, out = tensor(right).shape
        thin = plan.rights[0]
        if len(plan.rights) > 1:
            added = stacked(plan.rights, 0, self.node)
            self.fresh += added
            thin = added[-1]
        if right.target is aten.t.default:
            weight: fx.Node = right.args[0]  # type: ignore[assignment]
            tail = thin.args[0] if thin.target is aten.t.default else self._made(aten.t.default, (thin,), tensor(thin).t())
            wide = self._made(beside, (weight, tail, plan.alpha, plan.start, plan.room, planned),
                              tensor(weight).new_empty((out, rows + plan.room)))  # fmt: skip
            return self._made(aten.t.default, (wide,), tensor(wide).t())
        return self._made(below, (right, thin, plan.alpha, plan.start, plan.room, planned),
                          tensor(right).new_empty((rows + plan.room, out)))  # fmt: skip

    def _sum(self, product: fx.Node) -> fx.Node:
        """The other terms of the sum added to the new product; accumulation takes it from there."""
        result, value = product, tensor(product)
        for term in self.plan.found.wide:
            if term is not self.plan.wide:
                node = term.node
                if read_product(node) is None:
                    result = self._made(aten.addmm.default, (result, term.left, term.right), value)
                    result.kwargs = {"alpha": term.alpha}
                else:
                    result = self._made(ADD, (result, node), value)
        total = tensor(self.node)
        if total.dim() != 2:
            sizes = next(arg.args[1] for arg in self.node.args if isinstance(arg, fx.Node) and arg.target in RESHAPES)
            result = self._made(aten.view.default, (result, sizes), total)
        for other in self.others:
            result = self._made(ADD, (result, other), total)
        return result

    def _plan_room(self) -> None:
        """Tell the makers of x and W to leave the room."""
        plan = self.plan
        if plan.spacious:
            source = unviewed(plan.wide.left)
            op: fx.Node = source.args[0]  # type: ignore[assignment]
            free = _free_columns(plan.wide.left, plan.room)
            op.meta[ROOM] = {**op.meta.get(ROOM, {}), source.args[1]: (_like(op, source), free, plan.whole)}
        if self.planned:
            right = plan.wide.right
            across = right.target is aten.t.default
            weight = right.args[0] if across else right
            room = (0, _free_columns(weight, plan.room)) if across else (plan.room, 0)  # type: ignore[arg-type]
            weight.meta[TAKEN if self.planned == OWN else ROOM] = room  # type: ignore[union-attr]

    def _move_whole(self, left: fx.Node) -> None:
        """Whoever else reads h reads it in its new place; what is kept of it is copied, so as not to hold x with it."""
        plan = self.plan
        width = tensor(plan.wide.left).shape[1]
        users = [user for user in plan.whole.users if user not in self.fresh]
        if not users:
            return
        kept = any(user.op == "output" or any(reader.op == "output" for reader in user.users) for user in users)
        with self.graph.inserting_after(left):
            tail = made(aten.slice.Tensor, (left, 1, width, width + plan.room), tensor(plan.whole), plan.whole)
        if kept:
            with self.graph.inserting_after(tail):
                tail = made(aten.clone.default, (tail,), tensor(plan.whole), plan.whole)
                tail.kwargs = {"memory_format": torch.contiguous_format}
        for user in users:
            user.replace_input_with(plan.whole, tail)
            if STACKED in user.meta:
                user.meta[STACKED] = (plan.whole, *user.meta[STACKED][1:])
