"""The rule ``nf4_linear``: 4-bit linears of a graph are found, checked and rewritten, each with its site.

    linear(x, dequantize(packed), bias)          with dX = dY dequantize(packed), by the linear's own derivative

Nothing of the weight is saved for the backward but what it is packed as, which lives anyway: the dequantization is computed again there
(memory/tags.py). Before a kind of weight is used on a GPU, its kernel is compared with bitsandbytes' bit for bit on random contents:
once for all runs of this build on that GPU, with validate="full" once for each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import fx

from . import earlier_runs
from ._torch import disable_current_modes
from .canonical.quantized import QuantizedLinear, read_quantized_linears
from .lowering import implementation_on
from .quantized_op import Packed, by_bitsandbytes, dequantize_4bit
from .reporting.records import Site

RULE = "nf4_linear"
_CHECKED_NUMBERS = 2**18


def fuse_quantized_linears(gm: fx.GraphModule, use: Callable[[str], str], validate: str) -> list[Site]:
    """Rewrite the 4-bit linears of a graph, in place; ``use`` says for a rule why it is not used."""
    check = _trusted if validate == "off" else partial(_differs, again=validate == "full")
    return [_site(found) for found in read_quantized_linears(gm, use(RULE), check)]


def _trusted(*kind: object) -> str:
    return ""


def _site(found: QuantizedLinear) -> Site:
    if found.reason:
        return Site(RULE, found.module, "declined", found.reason)
    on_device = implementation_on(found.device)
    implementation = on_device if on_device == "triton" else "bitsandbytes"
    # Eager keeps the packed weight alone as well, and no activation, as the weight is frozen.
    return Site(RULE, found.module, "fused", implementation=implementation, saved_bytes_before=0, saved_bytes_after=0)


def _differs(device: torch.device, blocksize: int, quant_type: str, shape: tuple[int, int], dtype: torch.dtype, nested: bool,
             again: bool = False) -> str:  # fmt: skip
    """How our dequantization differs from bitsandbytes' for a kind of weight, or nothing."""
    if implementation_on(device.type) != "triton":
        return ""
    rows, columns = shape
    few = max(1, min(rows, _CHECKED_NUMBERS // columns))
    return _found_out(device, blocksize, quant_type, (few, columns), dtype, nested, again)


@lru_cache(maxsize=256)
def _found_out(device: torch.device, *asked_of: Any) -> str:
    """What ``check_kind`` finds, or an earlier run has found."""
    *kind, again = asked_of
    asked = (torch.cuda.get_device_name(device), *map(str, kind)) if device.type == "cuda" else ()
    known = earlier_runs.recall("nf4", *asked) if asked and not again else None
    if known is None:
        known = check_kind(device, *kind)
        if asked:
            earlier_runs.remember("nf4", known, *asked)
    return str(known)


def check_kind(device: torch.device, blocksize: int, quant_type: str, shape: tuple[int, int], dtype: torch.dtype,
               nested: bool) -> str:  # fmt: skip
    """How our dequantization of random contents differs from bitsandbytes', or nothing."""
    with disable_current_modes(), torch.no_grad():
        tensors = random_weight(device, blocksize, shape, nested)
        ours = dequantize_4bit(*tensors, blocksize, quant_type, list(shape), dtype)
        theirs = by_bitsandbytes(*tensors, blocksize, quant_type, shape, dtype)
        wrong = int((ours != theirs).sum())
    return "" if not wrong else f"its kernel differs from bitsandbytes' in {wrong} of {ours.numel()} numbers"


def random_weight(device: torch.device, blocksize: int, shape: tuple[int, int], nested: bool) -> Packed:
    """The five tensors of a weight with random contents: every nibble, scales over several magnitudes."""
    generator = torch.Generator().manual_seed(0)
    total = shape[0] * shape[1]
    blocks = -(-total // blocksize)
    packed = torch.randint(0, 256, (-(-total // 2), 1), dtype=torch.uint8, generator=generator)
    scales = torch.exp2(torch.randint(-8, 4, (blocks,), generator=generator)) * (1 + torch.rand(blocks, generator=generator))
    if not nested:
        return packed.to(device), scales.to(device), None, None, None
    quantized = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator)
    code = torch.linspace(-1, 1, 256) ** 3
    outer = scales[: -(-blocks // 256)].clone()
    return packed.to(device), outer.to(device), quantized.to(device), code.to(device), torch.tensor(0.0123, device=device)
