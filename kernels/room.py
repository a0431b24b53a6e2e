"""How many bytes may still be allocated on a device whose memory somebody plans.

To time and compare candidates takes memory for a moment, in the middle of a step that may have filled its budget. Where there is no
room nothing is timed, and the rule of thumb holds.
"""

from __future__ import annotations

import torch

_limits: dict[int, int] = {}  # by the index of a CUDA device: bytes that may be allocated in all


def limit(device: torch.device, total: int | None) -> None:
    """At most ``total`` bytes are to be allocated on a device from now on; None: as many as it has."""
    if device.type != "cuda":
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    if total is None:
        _limits.pop(index, None)
    else:
        _limits[index] = total


def is_there(needed: int, device: torch.device) -> bool:
    """Are there ``needed`` bytes left of the limit; True where there is none."""
    if device.type != "cuda" or not _limits:
        return True
    index = torch.cuda.current_device() if device.index is None else device.index
    total = _limits.get(index)
    return total is None or torch.cuda.memory_allocated(index) + needed <= total
