"""Canonicalization: a Dynamo, export or symbolic_trace graph in one small vocabulary of operations, in place.

``canonicalize(gm)`` changes how operations are written, never what they compute: values and gradients are the same bit for bit.
See vocabulary.py for the words, facts.py for what is known of a node.
"""

from __future__ import annotations

from torch.fx import GraphModule

from .spellings import read_spellings


def canonicalize(gm: GraphModule) -> GraphModule:
    """Rewrite a graph into the canonical vocabulary, in place, and return it."""
    read_spellings(gm)
    gm.graph.lint()
    gm.recompile()
    return gm


__all__ = ["canonicalize"]
