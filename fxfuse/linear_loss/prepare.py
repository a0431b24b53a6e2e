"""Small rewrites of a canonical graph after which a linear and its loss stand apart from what else looks at the logits.

    sizes       a size read off the logits is read off the hidden states
    copies      a copy of rows made for a reshape is left out
    branches    linear -> float -> shift -> loss, where ``float`` is also an output: the loss gets a chain of its own,
                linear -> shift -> float -> loss, and the output keeps the other
    sums        the sum of all elements of a pointwise function of the logits is the sum over rows of sums over columns

None of them changes a value, and all cost nothing where the linear is not fused in the end: a chain of pointwise operations is one more
region at most.
"""

from __future__ import annotations

import functools
import operator

from torch import fx

from ..canonical.builder import Builder, Leave
from ..canonical.facts import known_shape, same_size, tensor_inputs
from ..canonical.hoist import Chain, chain_before, is_row_view, replay
from ..canonical.vocabulary import CAST, MACROS, POINTWISE, REDUCTIONS, VIEWS, aten
from ..surgery import erase_dead
from .products import LINEARS
from .tail import total_kind
from .terms import read_logits


def prepare(gm: fx.GraphModule) -> None:
    """All of them, in place."""
    linears = [node for node in gm.graph.nodes if node.op == "call_function" and node.target in LINEARS]
    for linear in linears:
        read_sizes_off_hidden(linear)
    look_through_copies(gm)
    separate_branches(gm)
    sum_columns_first(gm)
    erase_dead(gm.graph)


def look_through_copies(gm: fx.GraphModule) -> None:
    """A reshape copies by itself where it must: the copy that was made for it (``contiguous``) is not needed."""
    for node in list(gm.graph.nodes):
        if node.target is aten.clone.default and node.users and all(user.target is aten.reshape.default for user in node.users):
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            gm.graph.erase_node(node)


def sum_columns_first(gm: fx.GraphModule) -> None:
    """``sum(x)`` -> ``sum(sum(x, -1))`` for pointwise functions of logits; a mean is that, divided by the number of elements."""
    builder = Builder(gm)
    for node in list(gm.graph.nodes):
        kind = total_kind(node, node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else ""
        x = node.args[0] if kind else None
        if x is None or len(known_shape(x)) < 2 or x.target not in POINTWISE or not _from_linear(x):
            continue
        builder.at(node)
        try:
            total = builder.call(aten.sum.default, builder.call(aten.sum.dim_IntList, x, [-1], False))
            if kind == "mean":
                total = builder.call(aten.div.Tensor, total, _count(builder, x))
        except Leave:
            builder.discard()
            continue
        node.replace_all_uses_with(total)
        gm.graph.erase_node(node)


def _count(b: Builder, x: fx.Node) -> object:
    """The number of elements."""
    return functools.reduce(lambda n, size: b.call(operator.mul, n, size) if isinstance(n, fx.Node) or isinstance(size, fx.Node)
                            else n * size, [size if isinstance(size, int) else b.call(aten.sym_size.int, x, i)
                                            for i, size in enumerate(known_shape(x))])


def _from_linear(x: fx.Node) -> bool:
    """Is a value computed from a linear by what may be in a row program."""
    pending, seen = [x], set()
    while pending:
        node = pending.pop()
        if read_logits(node) is not None and same_size(known_shape(node)[-1], known_shape(x)[-1]):
            return True
        if node not in seen and node.target in POINTWISE | REDUCTIONS | MACROS | VIEWS | {CAST}:
            seen.add(node)
            pending += tensor_inputs(node)
    return False


def read_sizes_off_hidden(linear: fx.Node) -> None:
    """A linear leaves the leading dimensions as they are."""
    for user in list(linear.users):
        if user.target is aten.sym_size.int and user.args[1] != len(known_shape(linear)) - 1:
            user.args = (linear.args[0], user.args[1])


def separate_branches(gm: fx.GraphModule) -> None:
    """Views of rows above the pointwise chain that they follow, computed anew where others read the chain too."""
    builder = Builder(gm)
    for node in list(gm.graph.nodes):
        chain = chain_before(node, lambda other: read_logits(other) is not None) if is_row_view(node) else None
        if chain is None or not _starts_at_linear(chain):
            continue
        builder.at(node)
        try:
            _branch(builder, chain)
        except Leave:
            builder.discard()


def _starts_at_linear(chain: Chain) -> bool:
    base = chain.start
    while is_row_view(base):
        base = base.args[0]  # type: ignore[assignment]
    return read_logits(base) is not None


def _branch(b: Builder, chain: Chain) -> None:
    x = replay(b, chain)[chain.maps[0]]
    chain.view.replace_all_uses_with(x)
    chain.view.graph.erase_node(chain.view)
