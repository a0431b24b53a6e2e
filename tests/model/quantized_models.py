"""Tiny models with bitsandbytes' 4-bit weights and PEFT's adapters on every linear, as QLoRA has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def in_4bit(model: nn.Module, compute_dtype: torch.dtype | None = torch.float32, keep: tuple[str, ...] = ("lm_head",),
            **options: Any) -> nn.Module:  # fmt: skip
    """``model`` with every linear but those in ``keep`` quantized in place, in the order and manner of transformers' loader."""
    from bitsandbytes.nn import Linear4bit

    options = {"quant_type": "nf4", "compress_statistics": True, **options}

    def packed(linear: nn.Linear) -> nn.Module:
        return Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, compute_dtype, **options)

    _replace_linears(model, packed, keep)
    model.is_loaded_in_4bit = True  # PEFT asks this, to choose its layers for bitsandbytes
    return model.train()


def in_8bit(model: nn.Module, keep: tuple[str, ...] = ("lm_head",)) -> nn.Module:
    """``model`` with every linear but those in ``keep`` in LLM.int8."""
    from bitsandbytes.nn import Linear8bitLt

    def packed(linear: nn.Linear) -> nn.Module:
        return Linear8bitLt(linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False)

    _replace_linears(model, packed, keep)
    model.is_loaded_in_8bit = True
    return model.train()


def _replace_linears(model: nn.Module, made: Callable[[nn.Linear], nn.Module], keep: tuple[str, ...]) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name not in keep:
                packed = made(child)
                packed.load_state_dict(child.state_dict())
                setattr(module, name, packed.to("cpu"))
    model.requires_grad_(False)


def with_adapters(model: nn.Module, rank: int = 4, **options: Any) -> nn.Module:
    """``model`` under PEFT: LoRA on all linears but the head, B filled so that it matters."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    settings = {"lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear", **options}
    wrapped = get_peft_model(model, LoraConfig(r=rank, **settings))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return wrapped.train()
