"""Small rewrites of a canonical graph after which a linear and its loss stand apart from what else looks at the logits.

    sizes       a size read off the logits is read off the hidden states
    branches    linear -> float -> shift -> loss, where ``float`` is also an output: the loss gets a chain of its own,
                linear -> shift -> float -> loss, and the output keeps the other
    sums        the sum of all elements of a pointwise function of the logits is the sum over rows of sums over columns

None of them changes a value, and all cost nothing where the linear is not fused in the end: a chain of pointwise operations is one more
region at most.
"""

from __future__ import annotations

from torch import fx

from ..canonical.builder import Builder, Leave, stands_for
from ..canonical.facts import known_shape, provenance, record, value_of
from ..canonical.hoist import Chain, chain_before, is_row_view, others_of
from ..canonical.vocabulary import aten
from .match import LINEARS


def prepare(gm: fx.GraphModule) -> None:
    """All of them, in place."""
    linears = [node for node in gm.graph.nodes if node.op == "call_function" and node.target in LINEARS]
    for linear in linears:
        read_sizes_off_hidden(linear)
    separate_branches(gm)


def read_sizes_off_hidden(linear: fx.Node) -> None:
    """A linear leaves the leading dimensions as they are."""
    for user in list(linear.users):
        if user.target is aten.sym_size.int and user.args[1] != len(known_shape(linear)) - 1:
            user.args = (linear.args[0], user.args[1])


def separate_branches(gm: fx.GraphModule) -> None:
    """Views of rows above the pointwise chain that they follow, computed anew where others read the chain too."""
    builder = Builder(gm)
    for node in list(gm.graph.nodes):
        chain = chain_before(node) if is_row_view(node) else None
        if chain is None or not _starts_at_linear(chain) or not any(others_of(x, chain) for x in chain.maps):
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
    return base.op == "call_function" and base.target in LINEARS


def _branch(b: Builder, chain: Chain) -> None:
    x = b.call(chain.view.target, chain.start, *chain.view.args[1:])
    for old in reversed(chain.maps):
        x = b.call(old.target, x, *old.args[1:], **old.kwargs)
        value = value_of(x)
        x.meta = provenance(old)
        record(x, value, like=old)
    if not stands_for(x, chain.view):
        raise Leave("the view of the chain is not the chain of the view")
    chain.view.replace_all_uses_with(x)
    chain.view.graph.erase_node(chain.view)
