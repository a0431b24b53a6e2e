"""Adapters that read the weight which they adapt (DoRA: W / |W + s B A| by row): what Dynamo needs to trace them.

PEFT asks for that weight by one function, whatever it is stored in. It begins by looking at the name of the module that the weight's
class is from, which Dynamo does not trace, so that no block with such an adapter was one graph. Dynamo is told here what the function
returns for plain weights and for 4-bit ones. Every other weight breaks the graph there, as before, and PEFT's own function runs.

Said once for the process, by torch's public registry; PEFT is not changed, and eager calls run its code.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from fxfuse._torch import graph_break

_told: set[str] = set()


def make_traceable() -> None:
    """Tell Dynamo of PEFT's function, once there is one. Nobody else's registration of it is touched."""
    library = sys.modules.get("peft.utils.integrations")
    if library is None or _told or not hasattr(library, "dequantize_module_weight"):
        return
    _told.add("dequantize_module_weight")
    try:
        torch.compiler.substitute_in_graph(library.dequantize_module_weight, skip_signature_check=True)(weight_of)
    except ValueError:  # (somebody has registered it before: theirs is used)
        return


def weight_of(module: nn.Module) -> Tensor:
    """The weight of an adapted linear, in the dtype that it computes in; written to be traced."""
    weight = module.weight
    if not hasattr(module, "W_q"):  # (what another library's quantized linears have)
        if type(weight) in (nn.Parameter, Tensor):
            return weight  # type: ignore[return-value]
        if getattr(weight, "quant_state", None) is not None:
            from bitsandbytes.functional import dequantize_4bit

            return dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[arg-type]
    graph_break(msg="an adapter reads a weight of a storage that is not traced")
    return weight  # type: ignore[return-value]
