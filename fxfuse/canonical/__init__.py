"""Canonicalization: a Dynamo, export or symbolic_trace graph in one small vocabulary of operations, in place.

``canonicalize(gm)`` changes how operations are written, never what they compute: values and gradients are the same bit for bit.
See vocabulary.py for the words, facts.py for what is known of a node.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import GraphModule, Node

from .cleanup import clean
from .hoist import hoist_row_views
from .mutation import functionalize
from .ranges import drop_dead_masks
from .spellings import read_spellings
from .symbols import settle_floats, settle_sizes, settle_widths

# Higher-order operations whose body is ordinary code of the model. (A custom autograd function's body is not: its backward is given.)
_TRANSPARENT = frozenset(["tag_activation_checkpoint", "invoke_subgraph", "wrap", "wrap_activation_checkpoint"])


def canonicalize(gm: GraphModule) -> GraphModule:
    """Rewrite a graph into the canonical vocabulary, in place, and return it."""
    for body in _bodies(gm):
        canonicalize(body)
    settle_floats(gm)
    settle_widths(gm)
    functionalize(gm)
    read_spellings(gm)
    settle_sizes(gm)
    drop_dead_masks(gm)
    clean(gm)
    hoist_row_views(gm)
    gm.graph.lint()
    gm.recompile()
    return gm


def _bodies(gm: GraphModule) -> Iterator[GraphModule]:
    """The bodies of the checkpointed and otherwise wrapped parts of a graph."""
    for node in gm.graph.nodes:
        body = getattr(gm, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(body, GraphModule) and node.users and all(_is_transparent(user) for user in node.users):
            yield body


def _is_transparent(node: Node) -> bool:
    return getattr(node.target, "__name__", None) in _TRANSPARENT


__all__ = ["canonicalize"]
