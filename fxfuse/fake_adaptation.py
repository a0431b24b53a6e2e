"""An imagined model set up as a trainer would set it up: 4-bit weights, frozen, and low-rank adapters on its linears.

Call these under ``fake_mode``: weights are fake tensors of the shapes and dtypes that the libraries would make, their own modules
around them, so that what is captured is what would run.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from fxfuse._torch import disable_current_modes

BLOCK, OUTER_BLOCK = 64, 256  # numbers a scale, and scales a scale: bitsandbytes' own with double quantization
USUAL_ALPHA = 16


def in_4bit(model: nn.Module) -> nn.Module:
    """``model`` with every linear but its output projection as bitsandbytes NF4, double-quantized, in place; nothing is trained."""
    kept = getattr(model, "get_output_embeddings", lambda: None)()
    dtype = getattr(model, "dtype", torch.bfloat16)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child is not kept:
                setattr(module, name, _packed(child, dtype))
    model.requires_grad_(False)
    model.is_loaded_in_4bit = True  # PEFT asks this, to choose its layers for bitsandbytes
    return model


def is_4bit(config: Any) -> bool:
    """Does a transformers config say that its weights are loaded in 4 bits."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return False
    found = settings.get("load_in_4bit") if isinstance(settings, dict) else getattr(settings, "load_in_4bit", False)
    return bool(found)


def with_adapters(model: nn.Module, rank: int) -> nn.Module:
    """``model`` under PEFT: LoRA on all its linears but the head, as trainers set it up (16-bit adapters on a 4-bit base)."""
    peft = importlib.import_module("peft")
    settings = peft.LoraConfig(r=rank, lora_alpha=USUAL_ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    dtype = model.dtype if getattr(model, "is_loaded_in_4bit", False) else torch.float32
    with disable_current_modes():  # modules of fake tensors cannot be moved to a device; those on the meta device PEFT does not move
        adapted = peft.get_peft_model(model, settings, low_cpu_mem_usage=True)
    for module in adapted.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=dtype)))
    return adapted


def _packed(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """bitsandbytes' layer in the image of a linear."""
    layers = importlib.import_module("bitsandbytes.nn")
    with disable_current_modes():  # a tiny real one, whose weight is then replaced
        packed = layers.Linear4bit(1, 1, linear.bias is not None, dtype, compress_statistics=True, quant_type="nf4")
    packed.in_features, packed.out_features = linear.in_features, linear.out_features
    weight = nn.Parameter(torch.empty((linear.weight.numel() + 1) // 2, 1, dtype=torch.uint8), requires_grad=False)
    # A quantized parameter is one of bitsandbytes' own class, which cannot be fake; a plain one that carries the same will do.
    vars(weight).update(quant_state=_state(linear.weight.shape, dtype), blocksize=BLOCK, compress_statistics=True, quant_type="nf4",
                        quant_storage=torch.uint8, bnb_quantized=True)
    packed.weight, packed.bias = weight, linear.bias
    packed.quant_state = weight.quant_state
    return packed


def _state(shape: torch.Size, dtype: torch.dtype) -> Any:
    """The quantization state of a weight of this shape: 8-bit scales, and the scales of those."""
    functional = importlib.import_module("bitsandbytes.functional")
    scales = -(-shape.numel() // BLOCK)
    of_scales = dict(code=torch.empty(256), blocksize=OUTER_BLOCK, dtype=torch.float32)
    outer = functional.QuantState(torch.empty(-(-scales // OUTER_BLOCK)), **of_scales)
    return functional.QuantState(
        torch.empty(scales, dtype=torch.uint8), shape, torch.empty(16), BLOCK, "nf4", dtype, torch.empty(()), outer)
