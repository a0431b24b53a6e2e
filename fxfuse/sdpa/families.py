"""The kernels of torch behind ``scaled_dot_product_attention``: what a call of one asks for, and what it returns.

A family is an operator and its backward. Their arguments are read by the names of their schemas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
BIASES = ("attn_bias", "attn_mask")


@dataclass(frozen=True)
class Family:
    """An operator and its backward.

    rest: what follows the result and the rows' sums in what the operator returns, for a call in which nothing is dropped
    again: the arguments of its backward from (arriving, query, key, value, all that was returned, causal)
    asks: arguments of the operator behind query, key and value, for a call
    """

    name: str
    operator: Any
    transpose: Any
    rest: Callable[[Tensor, Tensor], tuple]
    asks: Callable[[bool], tuple]
    again: Callable[[Tensor, Sequence[Tensor], tuple, bool], tuple]

    def forward(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None) -> tuple[Tensor, Tensor, tuple]:
        """The result, the logarithms of the rows' sums, and the rest of what the backward takes."""
        found = self.operator(query, key, value, *self.asks(causal), scale=scale)
        return found[0], found[1], tuple(found[2:])

    def backward(self, arriving: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, rest: tuple,
                 causal: bool, scale: float | None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        return self.transpose(*self.again(arriving, (query, key, value), (out, sums, *rest), causal), scale=scale)


def _counters(query: Tensor, key: Tensor, dtype: torch.dtype, *shapes: tuple[int, ...]) -> tuple:
    """No offsets of sequences, both lengths, where a generator of random numbers stands (which nothing reads), no weights."""
    return (None, None, query.size(2), key.size(2), *(query.new_empty(shape, dtype=dtype) for shape in shapes), None)


FAMILIES = (
    Family("cuDNN", aten._scaled_dot_product_cudnn_attention.default, aten._scaled_dot_product_cudnn_attention_backward.default,
           lambda query, key: _counters(query, key, torch.int64, (), ()),
           lambda causal: (None, True, 0.0, causal, False),
           lambda arriving, operands, found, causal: (arriving, *operands, *found[:2], *found[6:8], None, *found[2:6], 0.0, causal)),
    Family("flash attention", aten._scaled_dot_product_flash_attention.default,
           aten._scaled_dot_product_flash_attention_backward.default,
           lambda query, key: _counters(query, key, torch.uint64, (2,), ()),
           lambda causal: (0.0, causal, False),
           lambda arriving, operands, found, causal: (arriving, *operands, *found[:6], 0.0, causal, *found[6:8])),
    Family("flash attention", aten._scaled_dot_product_flash_attention_for_cpu.default,
           aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
           lambda query, key: (),
           lambda causal: (0.0, causal),
           lambda arriving, operands, found, causal: (arriving, *operands, *found[:2], 0.0, causal)),
)  # fmt: skip
FORWARDS = {family.operator: family for family in FAMILIES}
BACKWARDS = {family.transpose: family for family in FAMILIES}


def is_plain(node: fx.Node) -> bool:
    """Does a call of SDPA ask for nothing that only its kernel has: a bias, dropout, the weights themselves; with a mask and a scale
    that are known as the graph is made.

    One that asks for no sums of rows, without gradients, is given them all the same: a reference is computed as its policy is.
    """
    asked = arguments(node)
    return (all(asked.get(name) is None for name in BIASES) and asked.get("dropout_p", 0.0) == 0.0
            and not asked.get("return_debug_mask", False)
            and not any(isinstance(asked[name], fx.Node) for name in ("is_causal", "scale")))  # fmt: skip


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call of an operator, by name."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    defaults = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    return defaults | {argument.name: given for argument, given in zip(schema, node.args, strict=False)} | dict(node.kwargs)
