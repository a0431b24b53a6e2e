"""Which compiled graphs can be CUDA graphs: on one device, deciding nothing by data, drawing nothing, writing to no input.

What remains, such as an operator that waits for the device, torch finds out while it records.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .._torch import OpOverload
from ..canonical.facts import value_of
from ..quantized_op import is_dequantization

# Ops of fxfuse whose launches depend on nothing but shapes and the data they compute with.
_OURS = frozenset(("rows", "spread_rows", "collect_rows", "attention", "attention_backward"))
_OTHER_OPERANDS = {"attention": 3, "attention_backward": 4}  # where these have theirs: a mask, a bias
_SIZES_FROM_DATA = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


def why_unfit(graph: fx.Graph, device_type: str = "cuda") -> str:
    """Why a partitioned graph, before it is bufferized, cannot be recorded; or nothing."""
    devices: set[torch.device] = set()
    for node in graph.nodes:
        devices.update(tensor.device for tensor in _tensors(node))
        why = _why_not(node) if node.op == "call_function" else ""
        if why:
            return why
    foreign = sorted({device.type for device in devices} - {device_type})
    if foreign:
        return f"it has tensors on {', '.join(foreign)}"
    return "its tensors are on several devices" if len(devices) > 1 else ""


def _why_not(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"{target.name()} cannot be recorded"
    if not isinstance(target, OpOverload):
        return ""
    if any(tag in target.tags for tag in _SIZES_FROM_DATA):
        return f"{target} waits for a size or a number that the device computes"
    if torch.Tag.nondeterministic_seeded in target.tags and _dropout(node) != 0:
        return f"{target} draws random numbers"
    if target.namespace == "fxfuse" and target._opname not in _OURS and not is_dequantization(node):
        return f"{target} cannot be recorded"
    if target.namespace == "fxfuse" and target._opname in _OTHER_OPERANDS and node.args[_OTHER_OPERANDS[target._opname]]:
        return f"{target} looks at its mask, to leave out what that hides"
    written = [node.args[i] for i in _written(target) if i < len(node.args)]
    if any(isinstance(argument, fx.Node) and argument.op == "placeholder" for argument in written):
        return f"{target} writes to one of its inputs"
    return ""


def _dropout(node: fx.Node) -> Any:
    """The probability that an operator drops with; None for one that has none."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    for name in ("dropout_p", "dropout"):
        if name in names:
            position = names.index(name)
            default = node.target._schema.arguments[position].default_value  # type: ignore[union-attr]
            return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)
    return None


def _written(target: Any) -> list[int]:
    infos = [argument.alias_info for argument in target._schema.arguments]
    return [i for i, info in enumerate(infos) if info is not None and info.is_write]


def _tensors(node: fx.Node) -> list[Tensor]:
    value = value_of(node)
    tensors = [v for v in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(v, Tensor)]
    # A number in a tensor that the graph makes on the host is a constant of the launches that read it.
    return [t for t in tensors if node.op == "placeholder" or t.ndim or t.device.type != "cpu"]
