"""The op: ``fxfuse::attention``, two products with a row program between them, and its backward as an op of its own.

The text of the row program is an argument, so the op stands for any function of the scores that works row by row. It keeps its operands
and one or two numbers a row. Its derivative is put together from the transposes of the products and the derived row program
(execution.py); a second derivative is a named error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..errors import DoubleBackwardError
from ..fused_op import LIBRARY
from ..program import parse
from . import execution
from .execution import Attention
from .prepared import prepared

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
LIBRARY.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor[] others, str program, str scores) -> Tensor[]", tags=_TAGS
)
LIBRARY.define(
    "attention_backward(Tensor arriving, Tensor query, Tensor key, Tensor value, Tensor[] others, Tensor[] statistics, "
    "str program, str scores) -> Tensor[]",
    tags=_TAGS,
)
attention = torch.ops.fxfuse.attention.default
attention_backward = torch.ops.fxfuse.attention_backward.default


def _run(query: Tensor, key: Tensor, value: Tensor, others: Sequence[Tensor], program: str, scores: str) -> list[Tensor]:
    return execution.forward(Attention(query, key, value, others, prepared(program, scores)))


def _fake(query: Tensor, key: Tensor, value: Tensor, others: Sequence[Tensor], program: str, scores: str) -> list[Tensor]:
    b, h, queries, _ = query.shape
    dtypes = [reference.torch_dtype(o.dtype) for o in parse(program).outputs[1:]]
    return [_heads_behind(query, value.shape[3]), *(query.new_empty(b, h, queries, 1, dtype=dtype) for dtype in dtypes)]


def _run_backward(arriving: Tensor, query: Tensor, key: Tensor, value: Tensor, others: Sequence[Tensor], statistics: Sequence[Tensor],
                  program: str, scores: str) -> list[Tensor]:
    return execution.backward(Attention(query, key, value, others, prepared(program, scores)), arriving, statistics)


def _fake_backward(arriving: Tensor, query: Tensor, key: Tensor, value: Tensor, others: Sequence[Tensor],
                   statistics: Sequence[Tensor], program: str, scores: str) -> list[Tensor]:
    return [_heads_behind(query, query.shape[3]), _heads_behind(key, key.shape[3]), _heads_behind(value, value.shape[3])]


def _heads_behind(like: Tensor, width: int | torch.SymInt) -> Tensor:
    """[b, heads, length, width] with the heads behind the length in memory, as projections read and write it."""
    b, heads, length, _ = like.shape
    return like.new_empty(b, length, heads, width).transpose(1, 2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    query, key, value, others, ctx.program, ctx.scores = inputs
    ctx.set_materialize_grads(False)
    ctx.others = len(others)
    ctx.save_for_backward(query, key, value, *others, *output[1:])


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    if any(grad is not None for grad in grads[1:]):
        raise DoubleBackwardError(
            "fxfuse::attention has first derivatives only; take a second one without the rule (exclude=('attention',))"
        )
    rest = ([None] * ctx.others, None, None)
    if grads[0] is None:
        return None, None, None, *rest
    query, key, value, *saved = ctx.saved_tensors
    found = attention_backward(grads[0], query, key, value, saved[: ctx.others], saved[ctx.others :], ctx.program, ctx.scores)
    return *found, *rest


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("attention", _run, _device)
    LIBRARY.impl("attention_backward", _run_backward, _device)
torch.library.register_fake("fxfuse::attention", _fake, lib=LIBRARY)
torch.library.register_fake("fxfuse::attention_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autograd("fxfuse::attention", _backward, setup_context=_setup_context, lib=LIBRARY)
