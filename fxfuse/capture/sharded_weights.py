"""4-bit weights in shards of FSDP2.

A 4-bit parameter that FSDP2 gathers is a plain one, and has to be told again how it is quantized. bitsandbytes does so in the forward
of its linears, by a new parameter over the same storage; that is a change of a module which Dynamo does not trace. So it is done before
the captured forward, by bitsandbytes' own function, and the trace finds it done.
"""

from __future__ import annotations

import sys

from torch import nn


def restore_quantization(module: nn.Module) -> None:
    """Give the gathered 4-bit weights under ``module`` their quantization state back; nothing where FSDP2 does not manage it."""
    layers = sys.modules.get("bitsandbytes.nn.modules")
    if layers is None or "_is_fsdp_managed_module" not in vars(module):
        return
    for part in module.modules():
        if isinstance(part, layers.Linear4bit) and getattr(part, "quant_state", None) is not None:
            layers.fix_4bit_weight_quant_state_from_module(part)
