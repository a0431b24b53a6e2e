"""Which linears of a model can be stored in 4 bits, what each weighs, and what rounding makes of its weight.

bitsandbytes stores a weight in blocks of 64 numbers along its rows: 4 bits each, and one scale a block, which is float32, or
with nested statistics 8 bits and two float32 for every 256 scales (QLoRA, Dettmers et al. 2023, section 3).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

BLOCK = 64
_OUTER_BLOCK = 256


@dataclass(frozen=True)
class Linear:
    """One linear that may be quantized. ``transposed``: its weight is stored [inputs, outputs]."""

    name: str
    module: nn.Module
    transposed: bool

    @property
    def weight(self) -> nn.Parameter:
        """As it is stored."""
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def whole_bytes(self) -> int:
        """Of the weight as it is."""
        return self.weight.numel() * self.weight.element_size()

    def quantized_bytes(self, nested: bool) -> int:
        """Of the weight in 4 bits, with its scales."""
        blocks = -(-self.weight.numel() // BLOCK)
        scales = blocks + 8 * -(-blocks // _OUTER_BLOCK) if nested else 4 * blocks
        return -(-self.weight.numel() // 2) + scales

    def matrix(self) -> Tensor:
        """The weight as [outputs, inputs]."""
        return self.weight.detach().T if self.transposed else self.weight.detach()


def find_linears(model: PreTrainedModel, config: BitsAndBytesConfig) -> list[Linear]:
    """What transformers would quantize under ``config``, in the model's order: linears, but not tied ones and not the output head."""
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    # add_default_skips: a list of the caller's own comes on top of what transformers leaves out by itself.
    left_out = HfQuantizer.get_modules_to_not_convert(model, config.llm_int8_skip_modules, model._keep_in_fp32_modules, True)
    found, seen = [], set()
    for name, module in model.named_modules():
        kind = kind_of(module)
        if kind is None or not should_convert_module(name, left_out) or id(module.weight) in seen:
            continue
        seen.add(id(module.weight))
        found.append(Linear(name, module, kind == "conv1d"))
    return found


def kind_of(module: nn.Module) -> str | None:
    """"linear", "conv1d" (weights stored the other way round), or None for what transformers does not quantize."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return "conv1d"
    return "linear" if type(module) is nn.Linear else None


def rounded(linear: Linear, config: BitsAndBytesConfig) -> Tensor:
    """The numbers that the 4-bit weight stands for, [outputs, inputs], in the weight's dtype."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        linear.matrix().contiguous(), blocksize=BLOCK, compress_statistics=config.bnb_4bit_use_double_quant,
        quant_type=config.bnb_4bit_quant_type,
    )  # fmt: skip
    return functional.dequantize_4bit(packed, state)


@contextmanager
def as_quantized(linears: Iterable[Linear], config: BitsAndBytesConfig) -> Iterator[None]:
    """These linears compute with their rounded weights; afterwards they are bit for bit what they were, also on exceptions."""
    before: list[tuple[nn.Parameter, Tensor]] = []
    try:
        with torch.no_grad():
            for linear in linears:
                before.append((linear.weight, linear.weight.detach().clone()))
                matrix = rounded(linear, config)
                linear.weight.copy_(matrix.T if linear.transposed else matrix)
        yield
    finally:
        with torch.no_grad():
            for weight, original in before:
                weight.copy_(original)
