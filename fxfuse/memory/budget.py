"""The ``memory`` argument: None, "auto", a fraction of the device, bytes, or a size such as "22GiB"."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch

from .plan import size_text

_UNITS = {"": 1, "B": 1} | {f"{prefix}{suffix}": base**power
                            for power, prefix in enumerate("KMGT", start=1) for suffix, base in (("B", 1000), ("iB", 1024))}
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]i?B|B)\s*", re.IGNORECASE)
ACCEPTED = "None, 'auto', a fraction of the device (0 < x <= 1), bytes as an int, or a size such as '22GiB' or '500MB'"


@dataclass(frozen=True)
class Budget:
    """What the caller asked for. Exactly one of the three is set."""

    bytes: int | None = None
    fraction: float | None = None
    auto: bool = False

    def resolve(self, device: torch.device, in_use: int = 0) -> int:
        """Bytes that the whole process may have allocated on ``device``, those in use already included.

        in_use: bytes allocated now; "auto" takes what is free on top of them. A budget above the device is a ValueError.
        Where the size of the device is not known (a CPU), a fraction is one of the machine's memory.
        """
        total = device_bytes(device)
        if self.auto:
            return in_use + free_bytes(device)
        if self.fraction is not None:
            return int(self.fraction * total)
        assert self.bytes is not None
        if device.type == "cuda" and self.bytes > total:
            raise ValueError(f"memory={size_text(self.bytes)} is more than {device} has ({size_text(total)}); "
                             "give a smaller budget, a fraction, or 'auto'")
        return self.bytes


def parse_budget(memory: float | str | None) -> Budget | None:
    """The budget that ``memory`` asks for, None for none. TypeError and ValueError say what is accepted."""
    if memory is None:
        return None
    if isinstance(memory, bool) or not isinstance(memory, (int, float, str)):
        raise TypeError(f"memory takes {ACCEPTED}; got {type(memory).__name__} {memory!r}")
    if isinstance(memory, str):
        return _parse_text(memory)
    if isinstance(memory, int):
        if memory <= 0:
            raise ValueError(f"memory takes {ACCEPTED}; got {memory!r} bytes")
        if memory == 1:
            raise ValueError("memory=1 would be one byte; for the whole device give memory=1.0")
        return Budget(bytes=memory)
    if not (math.isfinite(memory) and 0 < memory <= 1):
        raise ValueError(f"memory takes {ACCEPTED}; got the float {memory!r}, which is no fraction (bytes are an int)")
    return Budget(fraction=memory)


def _parse_text(memory: str) -> Budget:
    if memory.strip().lower() == "auto":
        return Budget(auto=True)
    match = _SIZE.fullmatch(memory)
    if match is None:
        raise ValueError(f"memory takes {ACCEPTED}; got {memory!r}")
    units = {name.lower(): factor for name, factor in _UNITS.items()}
    count = int(float(match[1]) * units[match[2].lower()])
    if count <= 0:
        raise ValueError(f"memory takes {ACCEPTED}; got {memory!r}, which is nothing")
    return Budget(bytes=count)


def device_bytes(device: torch.device) -> int:
    """What the device has in all; on a CPU, the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_bytes(device: torch.device) -> int:
    """What the process could still allocate: free on the device, and held by torch's allocator without being used."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
