"""The two ways of an attention whose weights are a softmax of single scores, each direction for itself.

Both keep the same of a row of scores: the maximum, and the total of exp(x - maximum). FlexAttention gives the logarithm of the sum as
the maximum, and a total of 1. So either backward follows either forward.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..chunk_kernels import packed
from . import execution, flex
from .blocks import Blocks
from .execution import Attention
from .flex import Form, Kernel
from .prepared import prepared
from .softmax import softmax_of

CHUNKS, FLEX = "chunks", "flex"
Operands = tuple[Tensor, Tensor, Tensor]
Kept = tuple[Tensor, Tensor, Tensor]


class Ready(NamedTuple):
    """FlexAttention for a call: the kernel, the blocks of the mask, and the mask over every batch entry and head."""

    kernel: Kernel
    blocks: Blocks
    mask: Tensor


def forward_by_chunks(text: str, scores: str, operands: Operands, mask: Tensor) -> Kept:
    """(the result, maximum, total) for query, key and value; the numbers are [b, h, q, 1]."""
    softmax = softmax_of(text, scores)
    assert softmax is not None
    call = Attention(*operands, [mask], prepared(text, scores))
    out, *numbers = execution.forward(call)
    named = dict(zip(call.prepared.statistics, numbers, strict=True))
    return out, named[softmax.maximum], named[softmax.total]


def backward_by_chunks(text: str, scores: str, arriving: Tensor, operands: Operands, mask: Tensor, kept: Kept) -> list[Tensor]:
    """The gradients of query, key and value."""
    softmax = softmax_of(text, scores)
    assert softmax is not None
    named = {softmax.maximum: kept[1], softmax.total: kept[2]}
    call = Attention(*operands, [mask], prepared(text, scores))
    return execution.backward(call, arriving, [named[name] for name in call.prepared.statistics])


def forward_by_flex(ready: Ready, operands: Operands) -> Kept:
    out, lse = flex.run(ready.kernel, operands, ready.blocks, ready.mask)
    maximum = (lse * math.log(2)).unsqueeze(-1)
    return heads_behind(out), maximum, torch.ones_like(maximum)


def backward_by_flex(ready: Ready, arriving: Tensor, operands: Operands, kept: Kept) -> list[Tensor]:
    out, maximum, total = kept
    lse = ((maximum + total.log()) / math.log(2)).squeeze(-1)
    return list(flex.run(ready.kernel, (*operands, out, lse, heads_behind(arriving)), ready.blocks, ready.mask))


def forms(direction: str, operands: Operands) -> list[Form]:
    """Of what the kernel of a direction takes, as the functions above hand it over."""
    query, _, value = operands
    found = [Form.of(tensor) for tensor in operands]
    if direction == flex.BACKWARD:
        b, h, length, _ = query.shape
        width = value.shape[3]
        result = Form((b, h, length, width), (length * h * width, width, h * width, 1), query.dtype, query.device)
        found += [result, Form((b, h, length), (h * length, length, 1), torch.float32, query.device), result]
    return found


def heads_behind(tensor: Tensor) -> Tensor:
    """[b, heads, length, width] with the heads behind the length in memory."""
    return packed(tensor.transpose(1, 2)).transpose(1, 2)
