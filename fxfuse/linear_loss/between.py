"""Why the logits of a loss are not simply the output of a linear."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from ..canonical.facts import known_shape, same_size, tensor_inputs, tensor_of
from .products import LINEARS

_PRODUCTS = (*LINEARS, torch.addmm, torch.ops.aten.addmm.default, torch.baddbmm, torch.matmul, torch.ops.aten.mm.default)
_FAR = 12


def between(logits: fx.Node, differentiable: Collection[fx.Node]) -> tuple[fx.Node | None, str]:
    """(the linear that logits come from, what stands between it and them); (None, "") where they come from none."""
    classes = known_shape(logits)[-1]
    found: list[fx.Node] = []
    seen: set[fx.Node] = set()
    pending = [(logits, 0)]
    while pending:
        node, steps = pending.pop()
        if node in seen or node not in differentiable or node.op != "call_function":
            continue
        seen.add(node)
        if node.target in _PRODUCTS:
            found.append(node)
        if node.target not in LINEARS and steps < _FAR:
            pending += [(other, steps + 1) for other in tensor_inputs(node) if _as_wide(other, classes)]
    if not found:
        return None, ""
    if len(found) > 1:
        return found[-1], "the logits are a sum of several linears (an adapter on the output projection)"
    return found[0], f"between the linear and the loss stands {logits.name}, which depends on more than the logits of its row"


def _as_wide(node: fx.Node, classes: object) -> bool:
    tensor = tensor_of(node)
    return tensor is not None and tensor.dim() > 0 and same_size(tensor.shape[-1], classes)
