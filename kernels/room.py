"""How many bytes may still be allocated on a device whose memory somebody plans.

To time and compare candidates takes memory for a moment, in the middle of a step that may have filled its budget. Where there is no
room nothing is timed, and the rule of thumb holds.
"""

from __future__ import annotations

import torch
from torch import Tensor

_limits: dict[int, dict[int, int]] = {}  # by the index of a CUDA device and by who set them: bytes that may be allocated in all


def limit(device: torch.device, total: int | None, owner: int = 0) -> None:
    """At most ``total`` bytes are to be allocated on a device from now on, as far as ``owner`` is concerned; None: as many as it has.

    Of several limits the least holds. Whoever goes takes its own away, whenever that is, and no other's.
    """
    if device.type != "cuda":
        return
    limits = _limits.setdefault(_index(device), {})
    limits.pop(owner, None)
    if total is not None:
        limits[owner] = total


def is_there(needed: int, device: torch.device) -> bool:
    """Are there ``needed`` bytes left of the limit; True where there is none."""
    if device.type != "cuda" or not _limits:
        return True
    limits = _limits.get(_index(device))
    return not limits or torch.cuda.memory_allocated(device) + needed <= min(limits.values())


def another(tensor: Tensor) -> Tensor | None:
    """New memory for a tensor such as this one; None where there is none."""
    if not is_there(tensor.nbytes, tensor.device):
        return None
    try:
        return torch.empty_like(tensor)
    except torch.OutOfMemoryError:
        return None


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
