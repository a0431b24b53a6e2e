"""What a device can do that changes the text or the launch of a kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Abilities(NamedTuple):
    """pairs: it rounds two numbers to bfloat16 in one instruction (NVIDIA, compute capability 8.0).
    early: a kernel can be set up while the one before it still runs (9.0)."""

    pairs: bool = False
    early: bool = False


NONE = Abilities()


def of_capability(major: int) -> Abilities:
    """Of an NVIDIA device."""
    return Abilities(pairs=major >= 8, early=major >= 9)


def of_device(device: torch.device) -> Abilities:
    if device.type != "cuda" or torch.version.hip is not None:
        return NONE
    return of_capability(torch.cuda.get_device_capability(device)[0])
