"""The cost gate: a site that something else runs faster is left to it, and the report says to what.

Nothing is guessed: ``site_costs.json`` beside this file names, by device class and rule, what was measured faster and in which
benchmark run (``benchmarks/kernels.py``). A device or rule that is not in it runs the fused op. Rules that the caller asks for by
name are not gated. (Whether Inductor runs what lies between the sites is another table, remainder.json.)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from .remainder import device_class


@dataclass(frozen=True)
class Faster:
    """What runs a rule's sites faster than the fused op (``eager``: torch's own op); how much faster; the run that showed it."""

    implementation: str
    ratio: float
    run: str

    def __str__(self) -> str:
        return f"{self.implementation} is {self.ratio:.2f} times as fast on this device (run {self.run})"


def faster_elsewhere(rule: str, device: torch.device) -> Faster | None:
    """What is faster than the fused op for a rule on a device, if anything was measured to be."""
    row = site_costs().get(device_class(device), {}).get(rule)
    return None if row is None else Faster(row["implementation"], float(row["ratio"]), row["run"])


@lru_cache(maxsize=1)
def site_costs() -> dict[str, dict[str, dict[str, str]]]:
    """The table: device class -> rule -> row."""
    return json.loads((Path(__file__).parent / "site_costs.json").read_text(encoding="utf-8"))["faster"]
