"""The op ``fxfuse::flex_attention``: an attention whose weights are a softmax of a function of single scores, by FlexAttention.

It keeps its operands, its result and two numbers a row: of exp(x - maximum), the maximum and the total. Where a call cannot go there
(the mask adds something, a query sees nothing, there have been many layouts, a CUDA graph is captured), the same op runs over chunks
of queries (execution.py). FlexAttention gives the logarithm of the sum as the maximum, and a total of 1: either can follow the other.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from typing import Any

import torch
from torch import Tensor

from ..chunk_kernels import packed
from ..errors import DoubleBackwardError
from ..fused_op import LIBRARY
from . import execution, flex
from .blocks import Blocks, blocks_of
from .execution import Attention
from .flex import Form
from .prepared import prepared
from .softmax import Softmax, softmax_of

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
LIBRARY.define("flex_attention(Tensor query, Tensor key, Tensor value, Tensor mask, str program, str scores) "
               "-> (Tensor, Tensor, Tensor)", tags=_TAGS)
LIBRARY.define("flex_attention_backward(Tensor arriving, Tensor query, Tensor key, Tensor value, Tensor mask, Tensor out, "
               "Tensor maximum, Tensor total, str program, str scores) -> (Tensor, Tensor, Tensor)", tags=_TAGS)
flex_attention = torch.ops.fxfuse.flex_attention.default
flex_attention_backward = torch.ops.fxfuse.flex_attention_backward.default
# Layouts of one program that are compiled, the first at once. Compiling takes seconds, so batches whose lengths differ run over
# chunks, until a length has come so often that it will come again.
MOST_LAYOUTS = 4
OFTEN = 400  # calls, forward and backward, of all layers
MOST_SEEN = 4096  # layouts that are counted
_layouts: dict[str, set[tuple[Form, ...]]] = defaultdict(set)
_seen: dict[str, Counter[tuple[Form, ...]]] = defaultdict(Counter)


def _usable(softmax: Softmax, text: str, operands: tuple[Tensor, ...], mask: Tensor) -> Blocks | None:
    """The blocks of a mask, where the kernels can take them."""
    if softmax.mask is None or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    blocks = blocks_of(mask[(None,) * (4 - mask.dim())], softmax.mask.hides)
    layout, known = tuple(map(Form.of, operands)), _layouts[text]
    if not blocks.usable:
        return None
    if layout not in known:
        seen = _seen[text]
        if len(known) >= MOST_LAYOUTS or (layout not in seen and len(seen) >= MOST_SEEN):
            return None
        seen[layout] += 1
        if known and seen[layout] < OFTEN:
            return None
        known.add(layout)
        del seen[layout]
    return blocks


def _run(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, program: str, scores: str) -> tuple[Tensor, Tensor, Tensor]:
    softmax = softmax_of(program, scores)
    assert softmax is not None
    blocks = _usable(softmax, program, (query, key, value), mask)
    if blocks is not None:
        out, lse = flex.forward(softmax, program, (query, key, value), blocks)
        return _heads_behind(out), (lse * math.log(2)).unsqueeze(-1), lse.new_ones(*lse.shape, 1)
    call = Attention(query, key, value, [mask], prepared(program, scores))
    out, *numbers = execution.forward(call)
    named = dict(zip(call.prepared.statistics, numbers, strict=True))
    return out, named[softmax.maximum], named[softmax.total]


def _run_backward(arriving: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, out: Tensor, maximum: Tensor,
                  total: Tensor, program: str, scores: str) -> tuple[Tensor, Tensor, Tensor]:
    softmax = softmax_of(program, scores)
    assert softmax is not None
    blocks = _usable(softmax, program, (query, key, value), mask)
    if blocks is not None:
        lse = ((maximum + total.log()) / math.log(2)).squeeze(-1)
        found = flex.backward(softmax, program, (query, key, value, out, lse, _heads_behind(arriving)), blocks)
    else:
        named = {softmax.maximum: maximum, softmax.total: total}
        call = Attention(query, key, value, [mask], prepared(program, scores))
        found = execution.backward(call, arriving, [named[name] for name in call.prepared.statistics])  # type: ignore[assignment]
    return tuple(map(_heads_behind, found))  # type: ignore[return-value]


def _heads_behind(tensor: Tensor) -> Tensor:
    """[b, heads, length, width] with the heads behind the length in memory."""
    return packed(tensor.transpose(1, 2)).transpose(1, 2)


def _empty(like: Tensor, width: int | torch.SymInt) -> Tensor:
    b, heads, length, _ = like.shape
    return like.new_empty(b, length, heads, width).transpose(1, 2)


def _fake(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, program: str, scores: str) -> tuple[Tensor, Tensor, Tensor]:
    numbers = (query.new_empty(*query.shape[:3], 1, dtype=torch.float32) for _ in range(2))
    return _empty(query, value.shape[3]), *numbers


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
