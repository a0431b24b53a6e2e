"""Weights in shards of FSDP2: 4-bit ones, and an output projection that is gathered by itself.

A 4-bit parameter that FSDP2 gathers is a plain one, and has to be told again how it is quantized. bitsandbytes does so in the forward
of its linears, by a new parameter over the same storage; that is a change of a module which Dynamo does not trace. So it is done before
the captured forward, by bitsandbytes' own function, and the trace finds it done.

A projection with hooks of its own that gather its weight is not traced through: the loss is fused on its logits.
"""

from __future__ import annotations

import sys

from torch import nn

GATHERED_APART = (
    "{} is a unit of FSDP2 by itself, which gathers its weight in the middle of the head: the loss is computed on logits that are "
    "kept. Where the head belongs to the unit of the whole model, logits are never made (accelerate's plugin always takes it out; "
    "fully_shard by hand does not)"
)


def gathered_apart(head: nn.Module) -> str | None:
    """What to say where an output projection right below ``head`` is a unit of FSDP2, or None."""
    library = sys.modules.get("torch.distributed.fsdp")
    for name, child in head.named_children():
        if library is not None and isinstance(child, library.FSDPModule) and isinstance(child, nn.Linear):
            return GATHERED_APART.format(name)
    return None


def restore_quantization(module: nn.Module) -> None:
    """Give the gathered 4-bit weights under ``module`` their quantization state back; nothing where FSDP2 does not manage it."""
    layers = sys.modules.get("bitsandbytes.nn.modules")
    if layers is None or "_is_fsdp_managed_module" not in vars(module):
        return
    for part in module.modules():
        if isinstance(part, layers.Linear4bit) and getattr(part, "quant_state", None) is not None:
            layers.fix_4bit_weight_quant_state_from_module(part)
