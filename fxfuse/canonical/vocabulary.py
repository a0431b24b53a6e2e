"""The canonical vocabulary: the few operations that the later stages read, and the table from spellings to them.

After ``canonicalize`` a fusible operation is a ``call_function`` whose target is one of these overloads, with
positional arguments (``gelu`` and ``clone`` have a keyword, as their schemas demand). Python numbers stay Python numbers.

    pointwise   add sub mul div (Tensor)  pow (Tensor_Scalar)  neg sqrt exp sin ... (every torch.<name> of the table of functions)
                silu  gelu(x, approximate=...)  relu  softplus(x, beta, threshold)  abs sign minimum maximum
                clamp(x, min, max)  where (self, ScalarSelf, ScalarOther)  lt le gt ge eq ne (Tensor, Scalar)  logical_and/or/not
    cast        CAST: aten.to.dtype(x, dtype), always a change of dtype on the same device. Not prims.convert_element_type, which
                has no autograd formula: a graph that holds it cannot be differentiated.
    reductions  over the last dimension: sum.dim_IntList(x, [-1], keepdim)  mean.dim  amax  logsumexp
                var.dim(x, [-1], unbiased, keepdim)  linalg_vector_norm(x, 2, [-1], keepdim)
                gather(x, -1, index) of one element of each row
    macros      rms_norm(x, shape, w, eps)  layer_norm(x, shape, w, b, eps)  softmax.int(x, -1, dtype)  log_softmax.int
                cross_entropy_loss(x, target, w, reduction, ignore_index, smoothing)
    views       reshape(x, sizes)  permute(x, dims >= 0)  unsqueeze(x, dim < 0)  squeeze.dim(x, dim < 0)  expand(x, sizes)
                slice.Tensor(x, dim < 0, start, end, step)  select.int(x, dim < 0, i)  cat(xs, dim < 0)  stack(xs, dim < 0)
                repeat_interleave.self_int(x, n, dim < 0)  clone(x, memory_format=...)

A spelling is a name (of a Tensor method, of a function in torch, torch.nn.functional, operator..., of an aten packet) or a
callable; its *reader* takes the arguments by the spelling's own signature and gives the canonical nodes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from .._torch import OpOverload
from ..functions import FUNCTIONS

aten = torch.ops.aten

CAST = aten.to.dtype

UNARY = {name: getattr(aten, name).default for name in (*(f.name for f in FUNCTIONS.values() if f.is_torchs), "silu", "logical_not")}
ARITHMETIC = {name: getattr(aten, name).Tensor for name in ("add", "sub", "mul", "div")}
RELATIONS = ("lt", "le", "gt", "ge", "eq", "ne")

POINTWISE = frozenset(
    [
        *UNARY.values(),
        *ARITHMETIC.values(),
        *(getattr(getattr(aten, name), kind) for name in RELATIONS for kind in ("Tensor", "Scalar")),
        aten.pow.Tensor_Scalar,
        aten.gelu.default,
        aten.softplus.default,
        aten.minimum.default,
        aten.maximum.default,
        aten.clamp.default,
        aten.where.self,
        aten.where.ScalarSelf,
        aten.where.ScalarOther,
        aten.logical_and.default,
        aten.logical_or.default,
    ]
)
REDUCTIONS = frozenset(
    [
        aten.sum.dim_IntList,
        aten.mean.dim,
        aten.amax.default,
        aten.logsumexp.default,
        aten.var.dim,
        aten.linalg_vector_norm.default,
        aten.gather.default,
    ]
)
MACROS = frozenset(
    [
        aten.rms_norm.default,
        aten.layer_norm.default,
        aten.softmax.int,
        aten.log_softmax.int,
        aten.cross_entropy_loss.default,
    ]
)
VIEWS = frozenset(
    [
        aten.reshape.default,
        aten.permute.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.expand.default,
        aten.slice.Tensor,
        aten.select.int,
    ]
)
ASSEMBLIES = frozenset([aten.cat.default, aten.stack.default, aten.repeat_interleave.self_int, aten.clone.default])

CANONICAL = POINTWISE | REDUCTIONS | MACROS | VIEWS | ASSEMBLIES | {CAST}

# A reader takes (builder, *arguments of the spelling) and returns the node that stands for the result; where that is a tuple
# (``chunk``, ``max`` over a dimension), one node for each of its parts, None for a part that nothing reads.
Reader = Callable[..., Any]

_NAMESPACES = (torch, F, torch._C._nn, torch.special, torch.linalg, operator, torch.Tensor)
_BY_NAME: dict[str, Reader] = {}
_BY_CALLABLE: dict[Any, Reader] = {}


def spelling(*names: str, functions: tuple[Any, ...] = (), search: bool = True) -> Callable[[Reader], Reader]:
    """Register a reader under names and callables; ``search`` also takes the functions of these names in torch's namespaces."""

    def register(reader: Reader) -> Reader:
        for name in names:
            _BY_NAME[name] = reader
            for namespace in _NAMESPACES if search else ():
                if callable(found := getattr(namespace, name, None)):
                    _BY_CALLABLE[found] = reader
        for function in functions:
            _BY_CALLABLE[function] = reader
        return reader

    return register


def reader_of(node: Node) -> Reader | None:
    """The reader of the spelling that this node is, or None where the vocabulary has no word for it."""
    if node.op == "call_method":
        return _BY_NAME.get(str(node.target)) if _is_torchs(getattr(torch.Tensor, str(node.target), None)) else None
    if node.op != "call_function":
        return None
    if isinstance(node.target, OpOverload):
        named = _BY_NAME.get(node.target._schema.name.split("::")[1]) if _is_plain_aten(node.target) else None
        return _BY_CALLABLE.get(node.target, named)
    return _BY_CALLABLE.get(node.target)


def _is_torchs(method: Any) -> bool:
    """Is this no method that somebody put in the place of torch's; those of C have no code to look at."""
    return not hasattr(method, "__code__") or method.__code__.co_filename.startswith(torch.__path__[0])


def _is_plain_aten(overload: OpOverload) -> bool:
    return overload.namespace == "aten" and overload._overloadname != "out" and not overload._schema.is_mutable
