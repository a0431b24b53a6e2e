"""The op ``fxfuse::flex_attention``: an attention whose weights are a softmax of a function of single scores and a mask that hides.

It keeps its operands, its result and two numbers a row: of exp(x - maximum), the maximum and the total. Each call goes the way that its
layout takes (layouts.py): over chunks of queries, or by FlexAttention. Over chunks go besides: what a mask adds, queries that see
nothing, what a CUDA graph captures.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import DoubleBackwardError
from ..fused_op import LIBRARY
from . import layouts, ways
from .flex import BACKWARD, FORWARD
from .ways import heads_behind

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
LIBRARY.define("flex_attention(Tensor query, Tensor key, Tensor value, Tensor mask, str program, str scores) "
               "-> (Tensor, Tensor, Tensor)", tags=_TAGS)
LIBRARY.define("flex_attention_backward(Tensor arriving, Tensor query, Tensor key, Tensor value, Tensor mask, Tensor out, "
               "Tensor maximum, Tensor total, str program, str scores) -> (Tensor, Tensor, Tensor)", tags=_TAGS)
flex_attention = torch.ops.fxfuse.flex_attention.default
flex_attention_backward = torch.ops.fxfuse.flex_attention_backward.default


def _run(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, program: str, scores: str) -> tuple[Tensor, Tensor, Tensor]:
    operands = query, key, value
    ready = layouts.ready(FORWARD, program, scores, operands, mask)
    return ways.forward_by_chunks(program, scores, operands, mask) if ready is None else ways.forward_by_flex(ready, operands)


def _run_backward(arriving: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, out: Tensor, maximum: Tensor,
                  total: Tensor, program: str, scores: str) -> tuple[Tensor, Tensor, Tensor]:
    operands, kept = (query, key, value), (out, maximum, total)
    ready = layouts.ready(BACKWARD, program, scores, operands, mask)
    found = ways.backward_by_chunks(program, scores, arriving, operands, mask, kept) if ready is None else \
        ways.backward_by_flex(ready, arriving, operands, kept)  # fmt: skip
    return tuple(map(heads_behind, found))  # type: ignore[return-value]


def _empty(like: Tensor, width: int | torch.SymInt) -> Tensor:
    b, heads, length, _ = like.shape
    return like.new_empty(b, length, heads, width).transpose(1, 2)


def _fake(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, program: str, scores: str) -> tuple[Tensor, Tensor, Tensor]:
    maximum, total = (query.new_empty(*query.shape[:3], 1, dtype=torch.float32) for _ in range(2))
    return _empty(query, value.shape[3]), maximum, total


def _fake_backward(arriving: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, out: Tensor,
                   maximum: Tensor, total: Tensor, program: str, scores: str) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(query, query.shape[3]), _empty(key, key.shape[3]), _empty(value, value.shape[3])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *operands, ctx.program, ctx.scores = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*operands, *output)


def _backward(ctx: Any, arriving: Tensor | None, *of_numbers: Tensor | None) -> tuple[Any, ...]:
    if any(gradient is not None for gradient in of_numbers):
        raise DoubleBackwardError(
            "fxfuse::flex_attention has first derivatives only; take a second one without the rule (exclude=('attention',))"
        )
    if arriving is None:
        return (None,) * 6
    return *flex_attention_backward(arriving, *ctx.saved_tensors, ctx.program, ctx.scores), None, None, None


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("flex_attention", _run, _device)
    LIBRARY.impl("flex_attention_backward", _run_backward, _device)
torch.library.register_fake("fxfuse::flex_attention", _fake, lib=LIBRARY)
torch.library.register_fake("fxfuse::flex_attention_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autograd("fxfuse::flex_attention", _backward, setup_context=_setup_context, lib=LIBRARY)
