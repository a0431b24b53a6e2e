"""Attention by torch's FlexAttention: its higher-order ops, forward and backward, each compiled by Inductor on its own.

The score function comes from the row program (softmax.py), the blocks from the mask (blocks.py). What is compiled is one kernel for one
layout of its operands, so it is made once for all layers and kept by Inductor on disk, from where another process takes it. On a CPU
the higher-order ops run as they are (dense), which is for tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from .._torch import (
    FakeTensorMode,
    ShapeEnv,
    TracingContext,
    compile_fx,
    disable_current_modes,
    flex_attention,
    flex_attention_backward,
    flex_options,
    flex_score_graphs,
    indexing_in_graphs,
    tracing,
)
from .blocks import Blocks
from .softmax import softmax_of, without_types

FORWARD, BACKWARD = "forward", "backward"
# Options of the kernels by the columns of a head: rows and columns of a tile, warps, stages. Measured on an H200 with softcap attention
# (results/softcap_attention.jsonl): Inductor's own choice took 1.5 times as long forward. Other heads keep Inductor's.
OPTIONS: dict[int, dict[str, int]] = {
    256: {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 8, "fwd_num_stages": 2,
          "bwd_BLOCK_M1": 64, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 64, "bwd_num_warps": 8, "bwd_num_stages": 2},
}
Kernel = Callable[[Sequence[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class Form:
    """What a compiled kernel depends on of a tensor."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> Form:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)

    def made(self) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Request:
    """A kernel, in plain data: two processes that compile it make the same.

    forms: of the operands (``count`` of them), of the tensors among the blocks (which ``places`` says), of the mask
    rest: what else the blocks hold
    """

    direction: str
    text: str
    scores: str
    forms: tuple[Form, ...]
    count: int
    rest: tuple[Any, ...]
    places: tuple[int, ...]
    contiguous: bool


def request(direction: str, text: str, scores: str, operands: Sequence[Form], blocks: Blocks, mask: Form) -> Request:
    """The kernel for query, key and value, backward for the result, the forward's second result and the arriving gradient besides.
    mask: as ``expanded`` gives it."""
    forms = [Form.of(x) for x in blocks.tuple if isinstance(x, Tensor)]
    rest = tuple(None if isinstance(x, Tensor) else x for x in blocks.tuple)
    places = tuple(i for i, x in enumerate(blocks.tuple) if isinstance(x, Tensor))
    return Request(direction, text, scores, (*operands, *forms, mask), len(operands), rest, places, blocks.contiguous)


def expanded(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """[b, h, queries, keys]"""
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


def run(kernel: Kernel, operands: Sequence[Tensor], blocks: Blocks, mask: Tensor) -> tuple[Tensor, ...]:
    """Forward: the result, and the logarithm to base 2 of each row's sum. Backward: the gradients of query, key and value."""
    with disable_current_modes():  # AOTAutograd watches what its graphs run; this may be compiled in the middle of one
        return tuple(kernel([*operands, *(x for x in blocks.tuple if isinstance(x, Tensor)), mask]))


@lru_cache(maxsize=64)
def compiled(asked: Request) -> Kernel:
    """The kernel, compiled now, or taken from where Inductor keeps it on disk."""
    softmax = softmax_of(asked.text, asked.scores)
    assert softmax is not None
    forms, count = asked.forms, asked.count
    hides = softmax.mask.hides if softmax.mask is not None else None
    wishes = {"ROWS_GUARANTEED_SAFE": True, "BLOCKS_ARE_CONTIGUOUS": asked.contiguous, **OPTIONS.get(forms[0].shape[3], {})}
    score = softmax.score_function()

    @without_types
    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
        there = mask[batch, head, query, key]
        return there > torch.finfo(there.dtype).min if hides is None else there if hides is False else ~there

    def attention(*tensors: Tensor) -> tuple[Tensor, ...]:
        listed = list(asked.rest)
        for place, tensor in zip(asked.places, tensors[count:-1], strict=True):
            listed[place] = tensor
        options = flex_options(*tensors[:3], True, wishes)
        more = ((*listed, seen), 1.0, options, (), (tensors[-1],))
        if asked.direction == FORWARD:
            return flex_attention(*tensors[:3], score, *more)[:2]
        query, key, value, out, lse, arriving = tensors[:count]
        numbers = [query.new_zeros((), dtype=torch.float32, requires_grad=True),
                   *(query.new_zeros((), dtype=torch.int) for _ in range(4))]
        with torch.enable_grad(), indexing_in_graphs():
            graphs = flex_score_graphs(score, tuple(numbers), ())
        return flex_attention_backward(query, key, value, out, lse, arriving, None, *graphs, *more)[:3]

    # Inductor keeps on disk only what was traced beside an environment of symbolic sizes; there are none here.
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    with disable_current_modes(), mode, torch.no_grad():
        examples = [form.made() for form in forms]
        gm = make_fx(attention)(*examples)
    if forms[0].device.type != "cuda":
        return lambda tensors: gm(*tensors)
    with disable_current_modes(), tracing(TracingContext(mode)), torch.no_grad():  # another graph may be just being compiled
        function = compile_fx(gm, examples)
    return lambda tensors: function(*tensors)
