"""What may be in a region at all, and what may not stand inside one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from ..canonical.facts import is_plain, known_dtype, known_shape, module_path, static_size, tensor_of
from ..program import REAL_DTYPES
from . import operations as ops
from .region import Declined

_KINDS = (
    ops.POINTWISE,
    ops.REDUCTIONS,
    ops.ROW_MACROS,
    ops.CONCATENATIONS,
    ops.VIEWS,
    {ops.SLICE, ops.STACK},
)
NOT_FUSED = "fxfuse_not_fused"  # node.meta of what belongs to a matmul (products/thin_sums.py)
_DEVICES = ("cpu", "cuda", "meta")
_AMAX = torch.ops.aten.amax.default


def epochs_of(graph: fx.Graph) -> dict[fx.Node, int]:
    """A counter that steps at every node with an effect on the nodes around it."""
    epoch, epochs = 0, {}
    for node in graph.nodes:
        epochs[node] = epoch
        if node.op in ("call_function", "call_method") and _has_effect(node):
            epoch += 1
    return epochs


def _has_effect(node: fx.Node) -> bool:
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    name = getattr(node.target, "__name__", "")
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return bool(schema.is_mutable)
    return (name.endswith("_") and not name.endswith("__")) or name in (
        "_set_grad_enabled",
        "_enter_autocast",
        "_exit_autocast",
        "setitem",
        "iadd",
        "imul",
        "isub",
        "itruediv",
        "inductor_seeds",
    )


def is_fusible(node: fx.Node) -> bool:
    if node.op != "call_function" or not any(node.target in kind for kind in _KINDS) or NOT_FUSED in node.meta:
        return False
    tensor = tensor_of(node)
    if tensor is None or not _plain(tensor) or tensor.layout != torch.strided or tensor.is_complex():
        return False
    if any(not _plain(t) for t in map(tensor_of, node.all_input_nodes) if t is not None):
        return False
    if not tensor.is_floating_point() and node.target not in ops.TRUTH_VALUED:
        return False
    if str(tensor.dtype).removeprefix("torch.") not in (*REAL_DTYPES, "bool"):
        return False
    if node.target is ops.STACK:
        return _stacks_pairs(node)
    if node.target in (ops.CAT, ops.SLICE, ops.REPEAT):
        return _last_dim(node) and static_size(known_shape(node)[-1]) is not None and tensor.dim() > 0
    if node.target is _AMAX or node.target in ops.ROW_MACROS:
        return macro_obstacle(node) is None
    return node.target in ops.VIEWS or all(tensor_of(n) is not None for n in node.all_input_nodes)


def _plain(tensor: torch.Tensor) -> bool:
    """An ordinary tensor: a subclass (DTensor, a quantized weight) keeps its own dispatch."""
    return is_plain(tensor) and tensor.device.type in _DEVICES


def _last_dim(node: fx.Node) -> bool:
    rank = len(known_shape(node))
    dim = (
        node.args[2]
        if node.target is ops.REPEAT and len(node.args) > 2
        else node.args[1]
        if len(node.args) > 1
        else 0
    )
    if node.target in (ops.REPEAT, ops.SLICE) and any(isinstance(arg, fx.Node) for arg in node.args[1:]):
        return False
    return isinstance(dim, int) and dim % rank == rank - 1


def _stacks_pairs(node: fx.Node) -> bool:
    """``stack(parts, -1)`` whose only use is the flatten that interleaves the parts."""
    rank = len(known_shape(node))
    if len(node.args) < 2 or int(node.args[1]) % rank != rank - 1 or len(node.users) != 1:
        return False
    user = next(iter(node.users))
    if user.target is not ops.RESHAPE or len(known_shape(user)) != rank - 1:
        return False
    width = static_size(known_shape(node)[-2])
    return width is not None and static_size(known_shape(user)[-1]) == width * len(node.args[0])


def macro_obstacle(node: fx.Node) -> str | None:
    """Why a norm, softmax or loss cannot be a row program, or None."""
    rank = len(known_shape(node.args[0]))
    if node.target in (torch.ops.aten.rms_norm.default, torch.ops.aten.layer_norm.default):
        if len(node.args[1]) != 1:
            return (
                f"it normalises {len(node.args[1])} dimensions at once; a row program normalises the last one"
            )
    if node.target in (torch.ops.aten.softmax.int, torch.ops.aten.log_softmax.int):
        if int(node.args[1]) % max(rank, 1) != rank - 1:
            return "the softmax runs over a dimension that is not the last; move it last to have it fused"
    if node.target is ops.CROSS_ENTROPY:
        if rank != 2:
            return f"the loss takes logits of {rank} dimensions; flatten them to [tokens, classes] to have it fused"
        if node.args[2] is not None:
            return "the loss has class weights"
        if known_dtype(node.args[1]).is_floating_point:
            return "the loss takes class probabilities, not class indices"
    return None


def unfusible_macros(gm: fx.GraphModule) -> Iterable[Declined]:
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in ops.ROW_MACROS and tensor_of(node) is not None:
            reason = macro_obstacle(node) or (None if is_fusible(node) else _dtype_obstacle(node))
            if reason is not None:
                yield Declined(module_path(node), reason, nodes=[node])


def _dtype_obstacle(node: fx.Node) -> str:
    tensor: Any = tensor_of(node)
    return f"its tensors are {tensor.dtype} on {tensor.device.type} ({type(tensor).__name__}); cast or move them to have it fused"
