"""A fused op that computes each element from those at its place, and the thin products of its results, become one call.

    y, dgate, dup = rows(gate, up, g)                      the gate's backward; y again, for the gradient of the next adapter
    g1, dB1 = thin_pair(dgate, ...)    g2, dB2 = ...       two thin products of each gradient
    dA = h' y                                          ->  all of it in one pass: y is never stored, nothing is read twice

    gate = x W1' + h1 B1', up likewise; y = rows(gate, up)
                                                       ->  the low-rank terms are added as the op loads x W1', and what is kept of the
                                                           sums is stored beside y

On a graph for a GPU that nothing looks into any more, after the reuse of memory was planned. The call knows both ways and takes the one
that was faster where it stands (kernels/thin_map_sites.py). A gradient that is only cast to float32 is float32 at once.

Not done unless the environment has FXFUSE_THIN_MAPS=1: on an H200 the calls alone were faster (results/thin_map.jsonl: forward 0.18 ms,
apart 0.43; backward 0.46, apart 0.54), but whole steps were not (W2b 505.8 -> 504.8 ms, W2 662 -> 677).
"""

from __future__ import annotations

import operator
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..memory.joint import is_rows, outputs_of, program_of
from ..reuse import Reuse
from ..surgery import sort_topologically
from .augmented import ROOM
from .calls import thin_pair
from .map_terms import Term, large, sum_name, terms, with_sums
from .pairs import widened
from .terms import RESHAPES, is_tensor, made, read_product, size, tensor

aten = torch.ops.aten
MOST_RANK = 32  # of one product, and
LEAST, MOST_RANKS = 16, 96  # ranks that each product down counts for at least, and all of them at most: their sums lie in registers


@dataclass
class _Buffer:
    """Into what products across are written: a node, or a new one; ``result`` stands for it afterwards."""

    source: fx.Node | None
    width: int
    result: fx.Node


class _Across(NamedTuple):
    """``factor * output @ right`` into columns from ``start`` of a buffer, by its number."""

    output: int
    right: fx.Node
    factor: float
    buffer: int
    start: int


class _Down(NamedTuple):
    """``factor * output' @ left``, [N, R], or lying as [R, N]; pair: the number of the product across of the same call."""

    output: int
    left: fx.Node
    factor: float
    result: fx.Node
    lying: bool = False
    pair: int | None = None


@dataclass
class _Beside:
    """What is beside one fused op; ``calls``: those that go, each after what it reads.

    What they read stands before the op. So the one call can stand where the op stood: nothing has to move past an operation that may
    write over what is read here for the last time."""

    op: fx.Node
    order: Mapping[fx.Node, int]
    across: list[_Across] = field(default_factory=list)
    down: list[_Down] = field(default_factory=list)
    buffers: list[_Buffer] = field(default_factory=list)
    calls: list[fx.Node] = field(default_factory=list)
    terms: list[Term] = field(default_factory=list)

    def add(self, output: int, matrix: fx.Node, user: fx.Node) -> None:
        """A call that reads a result, if it is thin products of it that need nothing else of what the op gives."""
        if user.target is thin_pair and user.args[3] is matrix:
            self._add_pair(output, user)
            return
        term = read_product(user)
        if term is None:
            return
        if term.left is matrix and self._is_thin(term.right):
            self.across.append(_Across(output, term.right, term.alpha, len(self.buffers), 0))
            self.buffers.append(_Buffer(None, size(term.right, 1) or 0, user))
            self.calls.append(user)
        elif term.right is matrix and term.left.target is aten.t.default and self._is_thin(term.left.args[0]):
            result = widened(user)
            self.down.append(_Down(output, term.left.args[0], term.alpha, result, lying=True))  # type: ignore[arg-type]
            self.calls += [user] if result is user else [user, result]

    def _add_pair(self, output: int, user: fx.Node) -> None:
        source, start, width, _, right, left, alpha, beta, _ = user.args
        results = {getitem.args[1]: getitem for getitem in user.users}
        if set(results) != {0, 1} or not self._is_thin(right) or not self._is_thin(left):
            return
        number = next((i for i, buffer in enumerate(self.buffers) if buffer.result is source), None) if source is not None else None
        if number is not None:
            self.calls.append(source)  # type: ignore[arg-type]
            self.buffers[number].result = results[0]
        elif isinstance(source, fx.Node) and not self._is_before(source):
            return
        else:
            number = len(self.buffers)
            self.buffers.append(_Buffer(source, width, results[0]))  # type: ignore[arg-type]
        self.down.append(_Down(output, left, beta, results[1], pair=len(self.across)))  # type: ignore[arg-type]
        self.across.append(_Across(output, right, alpha, number, start))  # type: ignore[arg-type]
        self.calls += [user, results[1]]

    def _is_thin(self, matrix: Any) -> bool:
        """Is this a matrix of few columns that is there before the op."""
        thin = is_tensor(matrix) and tensor(matrix).dim() == 2 and (size(matrix, 1) or MOST_RANK + 1) <= MOST_RANK
        return thin and self._is_before(matrix)

    def _is_before(self, node: fx.Node) -> bool:
        return self.order[node] < self.order[self.op]


def wanted() -> bool:
    """Does the environment ask for it."""
    return os.environ.get("FXFUSE_THIN_MAPS", "0") == "1"


def fuse_maps(graph: fx.Graph, reuse: Mapping[fx.Node, Reuse]) -> int:
    """In place; returns how many. ``reuse``: of the fused ops of this graph."""
    count = 0
    for node in [n for n in graph.nodes if is_rows(n)]:
        found = _beside(node)
        if found is not None:
            _replace(found, reuse.get(node, Reuse((), ())))
            count += 1
    if count:
        sort_topologically(graph)
        graph.eliminate_dead_code()
    return count


def is_cut(op: fx.Node, inside: Collection[fx.Node]) -> bool:
    """Would a part of a graph for a GPU that holds a fused op be cut from thin products that could be one call with it."""
    found = _beside(op) if wanted() else None
    return found is not None and bool(found.down) and not all(call in inside for call in found.calls)


def _beside(op: fx.Node) -> _Beside | None:
    """The thin products of a map's results. (One that leaves room beside a result for a wider matmul stays as it is.)"""
    operands: Any = op.args[0]
    if op.meta.get(ROOM) or not large(operands[0]) or not all(
            is_tensor(operand) and _lies_densely(tensor(operand)) for operand in operands):  # fmt: skip
        return None
    from ..kernels.thin_map import suits  # Triton is there

    if not suits(program_of(op)):
        return None
    order = {node: i for i, node in enumerate(op.graph.nodes)}
    found = _Beside(op, order)
    readers = [(order[user], index, matrix, user) for index, output in outputs_of(op).items()
               for matrix in _matrices(output) for user in matrix.users]  # fmt: skip
    for _, index, matrix, user in sorted(readers, key=lambda reader: reader[0]):
        found.add(index, matrix, user)
    # Not both in one call: what that gains over a term written before has not been measured. A product across alone is as fast apart.
    if not found.down:
        found.terms = [term for term in terms(op) if all(user is op or order[user] > order[op] for user in term.operand.users)]
    if found.terms:
        return _Beside(op, order, terms=found.terms)
    ranks = sum(max(LEAST, size(down.left, 1) or 0) for down in found.down)
    return found if found.calls and ranks <= MOST_RANKS else None


def _lies_densely(value: Tensor) -> bool:
    """Is a tensor contiguous, whatever its sizes."""
    expected: Any = 1
    for size_, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if not statically_known_true(stride == expected):
            return False
        expected = expected * size_
    return True


def _matrices(output: fx.Node) -> Iterator[fx.Node]:
    """A result as a matrix, rows as rows."""
    for node in (output, *(user for user in output.users if user.target in RESHAPES)):
        if tensor(node).dim() == 2 and size(node, 1) is not None and size(node, 1) == size(output, -1):
            yield node


def _replace(found: _Beside, reuse: Reuse) -> None:
    """Put one call in the place of the fused op and the products."""
    from ..kernels.thin_map_sites import Down, Site, map_site
    from ..kernels.thin_map_source import Beside, Thin

    op, graph = found.op, found.op.graph
    program, outputs = program_of(op), outputs_of(op)
    kept = [term for term in found.terms if set(term.operand.users) != {op}]
    names = [*(output.name for output in program.outputs), *(sum_name(program, term.index) for term in kept)]
    gone = {*found.calls, *(buffer.result for buffer in found.buffers)}
    stored = {names[index] for index, output in outputs.items() if _is_read(output, gone)} | set(names[len(program.outputs) :])
    site = Site(
        str(with_sums(program, [term.index for term in kept])),
        Beside(
            tuple(Thin(program.arguments[t.index].name, size(t.left, 1) or 0, float(t.alpha)) for t in found.terms),
            tuple(name for name in names if name in stored),
            tuple(Thin(names[a.output], size(a.right, 1) or 0, float(a.factor)) for a in found.across),
            tuple(Thin(names[d.output], size(d.left, 1) or 0, float(d.factor)) for d in found.down),
        ),
        tuple((a.buffer, a.start) for a in found.across), tuple(b.width for b in found.buffers),
        tuple(Down(tensor(d.result).dtype.itemsize == 4, d.lying, d.pair) for d in found.down),
        (*(reuse.outputs or (None,) * len(program.outputs)), *(term.index for term in kept)), reuse.saved, len(kept),
    )  # fmt: skip
    operands = [*op.args[0]]  # type: ignore[misc]
    for term in found.terms:
        operands[term.index] = term.bare()
    args = (operands, [n for t in found.terms for n in (t.left, t.right)], [a.right for a in found.across],
            [d.left for d in found.down], [b.source for b in found.buffers])  # fmt: skip
    with graph.inserting_before(op):
        call = made(map_site(site), args, None, op)
        results = [*map(outputs.get, range(len(program.outputs))), *(t.operand for t in kept), *(b.result for b in found.buffers),
                   *(d.result for d in found.down)]  # fmt: skip
        for number, old in enumerate(results):
            if old is not None and (old not in outputs.values() or names[number] in stored):
                fresh = made(operator.getitem, (call, number), old.meta["val"], old)
                old.replace_all_uses_with(fresh, delete_user_cb=lambda user: user is not op and user is not call)


def _is_read(output: fx.Node, gone: set[fx.Node]) -> bool:
    """Does anything but calls that go read a result, through its views or directly."""
    readers = [user for node in (output, *(u for u in output.users if u.target in RESHAPES)) for user in node.users]
    return any(user not in gone and not (user.target in RESHAPES and user.args[0] is output) for user in readers)
