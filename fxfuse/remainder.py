"""``remainder="auto"``: eager, unless a measurement recorded for this class of device says that Inductor is faster.

The table is ``remainder.json`` beside this file; a row names the choice and the benchmark run that it comes from.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import torch


def fastest_remainder(device: torch.device | None) -> str:
    """``eager`` or ``inductor``."""
    row = _table().get(device_class(device))
    return row["remainder"] if row else "eager"


def device_class(device: torch.device | None) -> str:
    """The name under which a device is measured: ``cpu``, or what CUDA calls it."""
    if device is None or device.type != "cuda":
        return "cpu"
    return torch.cuda.get_device_name(device)


@lru_cache(maxsize=1)
def _table() -> dict[str, dict[str, str]]:
    return json.loads((Path(__file__).parent / "remainder.json").read_text(encoding="utf-8"))["measured"]
