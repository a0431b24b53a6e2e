"""Tiny models with bitsandbytes' 4-bit weights and PEFT's adapters on every linear, as QLoRA has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def in_4bit(model: nn.Module, compute_dtype: torch.dtype | None = torch.float32, keep: tuple[str, ...] = ("lm_head",),
            **options: Any) -> nn.Module:  # fmt: skip
    """``model`` with every linear but those in ``keep`` quantized in place, in the order and manner of transformers' loader."""
    from bitsandbytes.nn import Linear4bit

    options = {"quant_type": "nf4", "compress_statistics": True, **options}
    for module in list(model.modules()):
        for child_name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and child_name not in keep:
                packed = Linear4bit(child.in_features, child.out_features, child.bias is not None, compute_dtype, **options)
                packed.load_state_dict(child.state_dict())
                setattr(module, child_name, packed.to("cpu"))
    model.requires_grad_(False)
    model.is_loaded_in_4bit = True  # PEFT asks this, to choose its layers for bitsandbytes
    return model.train()


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
