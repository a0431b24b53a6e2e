"""Whether part of a graph can be computed again outside of it, later, with the same result."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

_RANDOM_WORDS = ("dropout", "gumbel", "rrelu")


def why_not_again(node: fx.Node, needed: Collection[fx.Node]) -> str:
    """Why ``node``, computed from the ``needed`` nodes, could come out otherwise the second time, or nothing."""
    switched = False
    for other in node.graph.nodes:
        name = getattr(other.target, "__name__", "")
        if name == "_enter_autocast":
            switched = True
        elif name == "_exit_autocast":
            switched = False
        elif switched and other in needed and other.op.startswith("call_"):
            return "the logits are an output of the graph, and are computed where the graph itself switches autocast"
        if other in needed and other.op.startswith("call_") and draws_random_numbers(other.target):
            return f"the logits are an output of the graph, and {other.name} before them draws random numbers"
        if other is node:
            break
    return ""


def draws_random_numbers(target: Any) -> bool:
    """Whether a call of this function, op or method name depends on the random state."""
    name = target if isinstance(target, str) else getattr(target, "_opname", getattr(target, "__name__", ""))
    if any(word in name for word in _RANDOM_WORDS):
        return True
    packet = getattr(torch.ops.aten, name, None) if name and not name.startswith("_") else None
    overloads = packet.overloads() if packet is not None else ()
    return any(torch.Tag.nondeterministic_seeded in getattr(packet, overload).tags for overload in overloads)
