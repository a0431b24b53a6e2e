"""Sums of products are written into one buffer: the first matmul makes it, the others add to it (beta=1); no kernel adds.

    add(add(a1 b1, a2 b2), a3 b3)        ->   c = a1 b1;  c += a2 b2;  c += a3 b3
    addmm(x W', h, B', alpha)            ->   c = alpha * h B';  c += x W'
    r + addmm(x W', h, B', alpha)        ->   c = r + alpha * h B';  c += x W'

Thin terms come first: such a product does nothing but write its result, and the wide one that follows reads it beside its own
arithmetic; the other way round, the thin one would read and write the result once more with nothing to hide that behind. Those whose
left factors lie side by side (stacking.py) are one term over the longer contraction: ``dX = [g1, g2, g3] [A1; A2; A3]``.

A buffer is always the fresh result of a matmul, or of another operation that makes its own memory, which nothing but this sum reads:
so it is no input, not saved, not returned, and no view of anything that is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..memory.joint import is_rows, outputs_of
from .calls import accumulate, left_parts, product
from .check import agrees
from .stacking import STACKED, stacked
from .terms import RESHAPES, Term, is_tensor, is_thin, made, matrix_source, read_product, size, tensor

aten = torch.ops.aten
ADD = aten.add.Tensor
_COPIES = (aten.clone.default,)
KEPT = "fxfuse_kept_in_training"  # key of ``Node.meta``

# Asked of each sum that could be accumulated: why it is not to be, or nothing; and told what came of it.
Ask = Callable[["Sum"], str]
Tell = Callable[["Sum", str], None]


@dataclass
class Sum:
    """``node`` = the sum of ``terms`` and of at most one other value, which may be written over or not."""

    node: fx.Node
    terms: list[Term]
    others: list[fx.Node]
    writable: bool = False

    @property
    def thin(self) -> list[Term]:
        """The terms of a short contraction."""
        return [term for term in self.terms if is_short(term)]

    @property
    def wide(self) -> list[Term]:
        return [term for term in self.terms if not is_short(term)]

    @property
    def biased(self) -> Term | None:
        """The product with a bias that the rest is added to, if that is what the sum writes over."""
        node = unviewed(self.others[0]) if self.writable else None
        if node is None or node.target is not aten.addmm.default or node.kwargs or tensor(node.args[0]).dim() != 1:  # type: ignore[arg-type]
            return None
        return Term(node, node.args[1], node.args[2], 1.0)  # type: ignore[arg-type]


def is_short(term: Term) -> bool:
    """Is the contraction short beside the columns of the result."""
    return term.left.target is left_parts or is_thin(size(term.left, 1), size(term.right, 1))


def base_of(found: Sum, term: Term) -> fx.Node | None:
    """The value of a sum that may not be written over, if a thin term can be added to it out of place: in 16 bits, rows as they lie."""
    if found.writable or not found.others or not is_short(term):
        return None
    value = tensor(found.others[0])
    fits = value.dtype.itemsize == 2 and value.dtype == tensor(term.left).dtype and value.is_contiguous() and value.dim() >= 2
    return found.others[0] if fits else None


def accumulate_sums(graph: fx.Graph, validate: str, ask: Ask, tell: Tell) -> int:
    """In place; returns how many sums."""
    count = 0
    for node in reversed(list(graph.nodes)):  # larger sums first; what cannot be one sum is tried in parts
        found = read_sum(node) if node.users else None
        if found is None:
            continue
        reason = ask(found) or _Placement(found).place(validate)
        tell(found, reason)
        count += not reason
    return count


def keep_streams(graph: fx.Graph) -> None:
    """In a graph without a backward: what a fused op gives beside what it makes of it, a stream beside its norm, is not written over.
    Training saves it, and adds a rounded product to it; a reference that is compared with training is to round alike.
    """
    for node in graph.nodes:
        read = [output for output in outputs_of(node).values() if output.users] if is_rows(node) else []
        for output in read if len(read) > 1 else ():
            output.meta[KEPT] = True


def read_sum(node: fx.Node) -> Sum | None:
    """A node that is a sum of products, two at least or one and something to add it to."""
    if not _is_sum(node):
        return None
    found = Sum(node, [], [])
    for operand in _operands(node, found):
        _collect(operand, found)
    dtypes = {tensor(n).dtype for n in (node, *(t.node for t in found.terms), *found.others)}
    if not found.terms or len(found.others) > 1 or len(dtypes) > 1:
        return None
    found.writable = bool(found.others) and _may_be_written(found.others[0])
    standing = sum(read_product(term.node) is not None for term in found.terms)
    return found if found.writable or (standing and len(found.terms) > 1) else None


def _is_sum(node: Any) -> bool:
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    if node.target is ADD:
        return len(node.args) == 2 and not node.kwargs and all(_same_rows(arg, node) for arg in node.args)
    return node.target is aten.addmm.default and "beta" not in node.kwargs and _same_rows(node.args[0], node)


def _same_rows(operand: Any, node: fx.Node) -> bool:
    """Is an operand a tensor of the sum's own shape and dtype (not broadcast)."""
    if not is_tensor(operand):
        return False
    a, b = tensor(operand), tensor(node)
    known = torch.fx.experimental.symbolic_shapes.statically_known_true
    return a.dtype == b.dtype and a.dim() == b.dim() and all(known(x == y) for x, y in zip(a.shape, b.shape, strict=True))


def _operands(node: fx.Node, found: Sum) -> list[fx.Node]:
    """What a sum adds up; an addmm's own product is one of its terms."""
    if node.target is ADD:
        return list(node.args)  # type: ignore[arg-type]
    found.terms.append(Term(node, node.args[1], node.args[2], node.kwargs.get("alpha", 1.0)))  # type: ignore[arg-type]
    return [node.args[0]]  # type: ignore[list-item]


def _collect(operand: fx.Node, found: Sum) -> None:
    """Add an operand's terms to a sum; what is read elsewhere too is no term of it."""
    node = operand
    while len(node.users) == 1 and (node.target in RESHAPES or node.target in _COPIES) and _keeps_rows(node):
        node = node.args[0]  # type: ignore[assignment]
    if len(node.users) == 1:
        term = read_product(node)
        if term is not None:
            found.terms.append(term)
            return
        if _is_sum(node):
            for inner in _operands(node, found):
                _collect(inner, found)
            return
    found.others.append(operand)


def _keeps_rows(node: fx.Node) -> bool:
    """Does a view leave the last dimension alone, so that rows stay rows."""
    source = node.args[0]
    if not is_tensor(source) or not tensor(source).dim() or not tensor(node).dim():  # type: ignore[arg-type]
        return False
    known = torch.fx.experimental.symbolic_shapes.statically_known_true
    return known(tensor(source).shape[-1] == tensor(node).shape[-1])  # type: ignore[arg-type]


def unviewed(node: fx.Node) -> fx.Node:
    """What a matrix is a view of, rows as rows."""
    while node.op == "call_function" and node.target in RESHAPES and _keeps_rows(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _may_be_written(node: fx.Node) -> bool:
    """May a sum be written over this operand: fresh memory, laid out as rows, that only the sum reads."""
    while len(node.users) == 1 and node.target in RESHAPES and _keeps_rows(node):
        node = node.args[0]  # type: ignore[assignment]
    if len(node.users) != 1 or KEPT in node.meta or not _makes_its_memory(node):
        return False
    return tensor(node).is_contiguous() and tensor(node).dim() >= 2


def _makes_its_memory(node: fx.Node) -> bool:
    """Is the result memory of its own: the output of a fused op, a matmul's or a sum's result."""
    if node.op != "call_function":
        return False
    if isinstance(node.args[0], fx.Node) and is_rows(node.args[0]):
        return True
    return node.target in (aten.mm.default, aten.addmm.default, aten.bmm.default, ADD, aten.mul.Tensor, aten.mul.Scalar,
                           aten._to_copy.default, aten.clone.default)


class _Placement:
    """One sum on its way into one buffer."""

    def __init__(self, found: Sum) -> None:
        self.found, self.node, self.graph = found, found.node, found.node.graph
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}
        self.fresh: list[fx.Node] = []
        self.left_over = [] if found.writable else list(found.others)  # what nothing has taken in yet
        # A thin term takes the bias: one more wide product, and nothing that was there before.
        biased = found.biased if found.thin else None
        self.biased = [] if biased is None else [biased]
        self.bias: Any = None if biased is None else biased.node.args[0]

    def place(self, validate: str) -> str:
        """Replace the sum; the reason if it stays."""
        result = self._shaped(self._chain())
        leaves = [leaf for term in (*self.found.terms, *self.biased) for leaf in (_whole(term.left), matrix_source(term.right))]
        leaves += [self.bias] if self.bias is not None else self.found.others
        verdict = agrees([self.node], [result], list(dict.fromkeys(leaves)), gradients=False, mode=validate)
        if verdict.reason:
            for added in reversed(self.fresh):
                self.graph.erase_node(added)
            return verdict.reason
        self.node.replace_all_uses_with(result)
        erase_unread(self.node)
        return ""

    def _chain(self) -> fx.Node:
        """The buffer after the last term: thin terms as soon as their factors are there, then wide ones where they stand."""
        wide = sorted([*self.found.wide, *self.biased], key=lambda term: self.order[term.node])
        terms = [*self._joined(self.found.thin), *wide]
        at = self._buffer(terms)
        for term in terms:
            if term.node is at:
                continue
            own = term.node if self.order[term.node] > self.order[at] else None
            at = self._added(own, at, accumulate, (at, term.left, term.right, term.alpha), tensor(at))
        return at

    def _added(self, before: fx.Node | None, after: fx.Node, target: Any, args: tuple, value: Any) -> fx.Node:
        """A new node before one that stands later, or as soon as what it reads is there."""
        anchor = max((n for n in (after, *_nodes(args)) if n in self.order), key=lambda n: self.order[n])
        with self.graph.inserting_before(before) if before is not None else self.graph.inserting_after(self._last(anchor)):
            fresh = made(target, args, value, self.node)
        self.order[fresh] = self.order[before if before is not None else anchor]
        self.fresh.append(fresh)
        return fresh

    def _last(self, anchor: fx.Node) -> fx.Node:
        """The newest of our own nodes directly behind a node, or the node itself."""
        while anchor.next in self.fresh:
            anchor = anchor.next
        return anchor

    def _buffer(self, terms: list[Term]) -> fx.Node:
        """What everything else is added to: what may be written over, or the first term."""
        if self.found.writable and self.bias is None:
            other = self.found.others[0]
            if tensor(other).dim() == 2:
                return other
            columns = tensor(other).shape[-1]
            return self._added(None, other, aten.view.default, (other, [-1, columns]), tensor(other).reshape(-1, columns))
        term = terms[0]
        if read_product(term.node) is not None and not is_short(term):
            return term.node
        value = tensor(term.left).new_empty((tensor(term.left).shape[0], tensor(term.right).shape[1]))
        base = self._base(term) if self.bias is None else self.bias
        if base is None:
            first = self._added(None, term.left, product, (term.left, term.right, term.alpha), value)
        else:
            first = self._added(None, term.left, aten.addmm.default, (base, term.left, term.right), value)
            first.kwargs = {"alpha": term.alpha}
        terms[0] = Term(first, term.left, term.right, term.alpha)
        return first

    def _base(self, term: Term) -> fx.Node | None:
        """What goes by, as the matrix that a thin term is added to: it is read where the term is written."""
        other = base_of(self.found, term)
        if other is None:
            return None
        self.left_over, value = [], tensor(other)
        if value.dim() == 2:
            return other
        shape = [-1, value.shape[-1]]
        return self._added(None, other, aten.view.default, (other, shape), value.reshape(shape))

    def _joined(self, thin: list[Term]) -> list[Term]:
        """Terms whose left factors are neighbouring columns of one matrix are one term."""
        groups: dict[tuple, list[Term]] = {}
        for term in thin:
            whole = term.left.meta.get(STACKED, (term.left,))[0]
            groups.setdefault((whole, term.alpha), []).append(term)
        return [self._one(group) for group in groups.values()]

    def _one(self, group: list[Term]) -> Term:
        spans = sorted((term.left.meta[STACKED][1:], i) for i, term in enumerate(group)) if len(group) > 1 else []
        ends = [span[1] for span, _ in spans]
        if not spans or any(span[0] != end for (span, _), end in zip(spans[1:], ends, strict=False)):
            return group[0]
        terms = [group[i] for _, i in spans]
        whole = terms[0].left.meta[STACKED][0]
        start, end = spans[0][0][0], ends[-1]
        late = max(terms, key=lambda term: self.order[term.node]).node
        anchor = max((late, *(term.right for term in terms)), key=lambda n: self.order[n])
        with self.graph.inserting_before(self.node):
            left = whole
            if (start, end) != (0, tensor(whole).shape[1]):
                left = made(aten.slice.Tensor, (whole, 1, start, end), tensor(whole)[:, start:end], anchor)
                self.fresh.append(left)
            rights = stacked([term.right for term in terms], 0, anchor)
        self.fresh += rights
        for added in self.fresh:
            self.order.setdefault(added, self.order[self.node])
        return Term(self.node, left, rights[-1], terms[0].alpha)

    def _shaped(self, buffer: fx.Node) -> fx.Node:
        """The buffer as the sum was shaped, and what could not be written over added to it."""
        value, result = tensor(self.node), buffer
        if value.dim() != 2:
            sizes = next(arg.args[1] for arg in self.node.args if isinstance(arg, fx.Node) and arg.target in RESHAPES)
            result = self._added(self.node, buffer, aten.view.default, (buffer, sizes), value)
        for other in self.left_over:
            result = self._added(self.node, result, ADD, (result, other), value)
        return result


def erase_unread(node: fx.Node) -> None:
    """Erase a sum that nothing reads any more, and what only it read."""
    if node.users or node.op != "call_function":
        return
    operands = node.all_input_nodes
    node.graph.erase_node(node)
    for operand in operands:
        erase_unread(operand)


def _whole(left: fx.Node) -> fx.Node:
    """The matrix of which a left factor is some columns."""
    return left.meta[STACKED][0] if STACKED in left.meta else left


def _nodes(args: tuple) -> list[fx.Node]:
    return [argument for argument in args if isinstance(argument, fx.Node)]
