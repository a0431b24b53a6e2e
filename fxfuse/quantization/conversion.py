"""The chosen linears become bitsandbytes linears, through transformers' own quantizer, in place.

The result is what ``from_pretrained(..., quantization_config=...)`` makes: the same classes, config and flags, so saving and
loading need nothing but transformers. What stays in 16 bits stands in the config's skip list. One bitsandbytes config is of one
width, so "8 bits for the worst" cannot be said in it; they stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from .linears import Linear, kind_of

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel


def convert(model: PreTrainedModel, linears: Sequence[Linear], kept: Sequence[str], config: BitsAndBytesConfig) -> None:
    """Store ``linears`` but ``kept`` in 4 bits; ``config`` gets the skip list."""
    import bitsandbytes
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    going = {each.name: each for each in linears if each.name not in set(kept)}
    config.llm_int8_skip_modules = _skip_list(model, set(going))
    quantizer = Bnb4BitHfQuantizer(config, pre_quantized=False)
    quantizer.preprocess_model(model, device_map=None)
    for name, linear in going.items():
        module = model.get_submodule(name)
        assert isinstance(module, bitsandbytes.nn.Linear4bit), name
        _fill(module, linear)
    # A loaded model's quantizer knows that its weights are quantized already; this one's are, from here on.
    quantizer.pre_quantized = True
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)


def _fill(module: nn.Module, linear: Linear) -> None:
    """Weight and bias of the linear that was there; a weight is quantized on the device it lies on."""
    import bitsandbytes

    empty = module.weight
    device = linear.weight.device
    module.weight = bitsandbytes.nn.Params4bit(
        linear.matrix().contiguous(), requires_grad=False, compress_statistics=empty.compress_statistics,
        quant_type=empty.quant_type, quant_storage=empty.quant_storage, blocksize=empty.blocksize, module=module,
    ).to(device)  # fmt: skip
    bias = linear.module.bias
    module.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    module.train(linear.module.training)


def _skip_list(model: PreTrainedModel, going: set[str]) -> list[str]:
    """Names of all linears that stay, so that transformers, which reads them as beginnings of names, quantizes ``going`` alone.

    Plain names are what other readers of the list (vLLM) know. One is closed with ``$`` only where it is the beginning of a
    name that shall be quantized ("experts.1" of "experts.10").
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    names = []
    for name, module in model.named_modules():
        if name in going or kind_of(module) is None:
            continue
        plain = all(should_convert_module(other, [name]) for other in going)
        names.append(name if plain else f"{re.escape(name)}$")
    return names
