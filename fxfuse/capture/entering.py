"""The first block of a stack takes what nobody wants a gradient of (embeddings of a frozen table); every later one takes what does
want one. For Dynamo and AOTAutograd these are two graphs, and the first would be compiled for one layer alone.

So that all blocks share one graph, the input of such a block enters it as a tensor that requires a gradient: the same memory, the same
version counter, no view. The gradient that arrives for it is dropped where it entered. It costs the products of one layer's input
gradient. What the parameters get are the same sums; nothing is accumulated anywhere that was not before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


class _Entry(torch.autograd.Function):
    """The identity, whose cotangent is dropped. ``anchor`` gives autograd a reason to make a node."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, given: Tensor) -> Tensor:
        return given.detach()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[None, None]:
        return None, None


_anchor = torch.zeros((), requires_grad=True)  # gets no gradient either: None is passed on to it


def entered(block: nn.Module, args: tuple) -> tuple:
    """The arguments for a block that shares its graph with others, the first one as those will get it: requiring a gradient.

    They are ``args`` themselves where nothing is to be done: no gradient is wanted of anything here, it requires one already, or is no
    plain tensor of floating-point numbers.
    """
    given: Any = args[0] if args else None
    if type(given) is not Tensor or given.requires_grad or not torch.is_grad_enabled():
        return args
    if not given.is_floating_point() or given.is_inference() or not any(p.requires_grad for p in block.parameters()):
        return args
    return _Entry.apply(_anchor, given), *args[1:]


def returned(out: Any, entry: tuple, args: tuple) -> Any:
    """What a block gave for ``entry``, with the tensor that was given in its place, should it be returned as it came."""
    if entry is args or not any(leaf is entry[0] for leaf in tree_leaves(out)):
        return out
    return tree_map(lambda leaf: args[0] if leaf is entry[0] else leaf, out)
