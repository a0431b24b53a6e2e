"""Which linears stay in 16 bits: the most divergence saved within the bytes that there are.

Divergences of single linears are taken to add up, which makes it a knapsack; it is filled by divergence saved per byte, and what
does not fit is passed over. Whether they did add up is measured afterwards and stands in the table.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..memory.plan import size_text
from .linears import Linear
from .sensitivity import Sensitivity


@dataclass(frozen=True)
class Row:
    """One linear: what it weighs in either form (bytes), how sensitive it is, and whether it stays as it was."""

    name: str
    whole_bytes: int
    quantized_bytes: int
    sensitivity: Sensitivity
    kept: bool

    @property
    def extra(self) -> int:
        """What keeping it costs."""
        return self.whole_bytes - self.quantized_bytes

    @property
    def gain(self) -> float:
        """Nats a token saved for each MiB that keeping it costs."""
        return self.sensitivity.divergence / max(1, self.extra) * 2**20


@dataclass
class Selection:
    """What was decided, and what it does to the predictions (nats a token, on the calibration text).

    budget: bytes for all these linears. uniform, selected: divergence with all of them in 4 bits, and with the kept ones as they were.
    """

    rows: list[Row]
    budget: int
    uniform: float | None = None
    selected: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def kept(self) -> list[str]:
        """Names of the linears that stay in 16 bits."""
        return [row.name for row in self.rows if row.kept]

    @property
    def bytes(self) -> int:
        """Of all these linears' weights after quantization."""
        return sum(row.whole_bytes if row.kept else row.quantized_bytes for row in self.rows)

    def __str__(self) -> str:
        from .selection_table import as_text

        return as_text(self)

    def to_json(self) -> str:
        """Everything, for a machine."""
        return json.dumps(asdict(self) | {"kept": self.kept, "bytes": self.bytes}, indent=1)

    def plot(self, path: str | Path) -> Path:
        """Divergence of each linear in the model's order, kept ones marked, as PNG or SVG by the file's name. Needs matplotlib."""
        from .selection_table import as_plot

        return as_plot(self, Path(path))


def select(linears: Sequence[Linear], measured: dict[str, Sensitivity], budget: int, nested: bool) -> Selection:
    """Fill ``budget`` bytes (of ``bytes_of``, which refuses one under what 4 bits take altogether)."""
    rows = [Row(each.name, each.whole_bytes, each.quantized_bytes(nested), measured[each.name], False) for each in linears]
    left = budget - sum(row.quantized_bytes for row in rows)
    kept = set()
    for row in sorted(rows, key=lambda row: (-row.gain, row.name)):
        if row.extra <= left and row.sensitivity.divergence > 0:
            kept.add(row.name)
            left -= row.extra
    return Selection([Row(**(vars(row) | {"kept": row.name in kept})) for row in rows], budget)


def bytes_of(budget: float | str, linears: Sequence[Linear], nested: bool) -> int:
    """The ``budget`` argument in bytes for these linears' weights: a float is a share on top of what 4 bits take.

    TypeError and ValueError say what is accepted; a budget under what 4 bits take altogether is a ValueError too.
    """
    from ..memory.budget import parse_budget

    accepted = "budget takes a share of extra bytes over uniform 4 bits (0 <= x), bytes as an int, or a size such as '4.5GiB'"
    if isinstance(budget, bool) or not isinstance(budget, (int, float, str)):
        raise TypeError(f"{accepted}; got {type(budget).__name__} {budget!r}")
    least = sum(each.quantized_bytes(nested) for each in linears)
    if isinstance(budget, float):
        if not 0 <= budget < float("inf"):
            raise ValueError(f"{accepted}; got {budget!r}")
        return int(least * (1 + budget))
    parsed = parse_budget(budget)
    if parsed is None or parsed.bytes is None:
        raise ValueError(f"{accepted}; got {budget!r}")
    if parsed.bytes < least:
        raise ValueError(f"budget={size_text(parsed.bytes)} is less than these linears take in 4 bits ({size_text(least)}); "
                         "give at least that, or a fraction of extra bytes such as 0.1")
    return parsed.bytes
