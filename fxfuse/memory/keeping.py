"""Cheap outputs that stay in memory, where a plan has room for them that nothing else needs.

``recompute.py`` lets the backward compute cheap outputs again. Those that a product of the backward reads (a gate's for the gradient of
the down projection, a norm's for those of the projections after it) have to be written once more for it; kept, they are read as the
forward left them. They are the same bits.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise

from torch import fx

from .costs import PRODUCTS, Rates
from .joint import views_of
from .recompute import REPEATS
from .sizes import Sizes

# Outputs this much smaller than the largest are not worth naming.
_SMALL = 16


def worth_keeping(graph: fx.Graph, sizes: Sizes) -> list[tuple[str, ...]]:
    """Names of values of a tagged joint graph's forward that the backward writes again as operands of products: the largest, then these
    with the next largest, and so on to all. Values that are equally large come together."""
    everything = set(graph.nodes)
    weighed = {node.meta[REPEATS]: sizes.bytes(node.meta["val"]) for node in graph.nodes if REPEATS in node.meta
               and any(user.target in PRODUCTS for alias in views_of(node, everything) for user in alias.users)}
    least = max(weighed.values(), default=0) / _SMALL
    names = sorted((name for name, count in weighed.items() if count > least), key=lambda name: -weighed[name])
    ends = [i for i, (name, following) in enumerate(pairwise(names), 1) if weighed[name] != weighed[following]]
    return [tuple(names[:end]) for end in (*ends, len(names)) if end]


def keep_outputs(graph: fx.Graph, names: Collection[str]) -> None:
    """The backward reads the named values as the forward made them, in place of values computed again. In place."""
    if not names:
        return
    made = {node.name: node for node in graph.nodes if node.name in names}
    for again in [node for node in graph.nodes if node.meta.get(REPEATS) in made]:
        again.replace_all_uses_with(made[again.meta[REPEATS]])
    graph.eliminate_dead_code()
    graph.lint()


def spared_ms(graph: fx.Graph, names: Collection[str], sizes: Sizes, rates: Rates) -> float:
    """What is not written a second time, at the rate of a copy; reading again costs little, as others read the same."""
    return sum(sizes.bytes(node.meta["val"]) for node in graph.nodes if node.name in names) / rates.copy * 1e3
