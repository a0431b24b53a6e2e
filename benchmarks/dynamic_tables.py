"""The table of dynamic 4-bit: held-out loss of each way of choosing what stays in 16 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.markdown import grid, source
from benchmarks.rows import read

Row = dict[str, Any]
WAYS = ("fxfuse", "random", "first", "last")


def dynamic_4bit(results: Path) -> str:
    """By how much the held-out loss exceeds that of 16 bits, and the divergence from it; of the random draws the best."""
    found = [row for row in read(results / "dynamic_4bit.jsonl") if row["recipe"] != "tiny"]
    if not found:
        return "Not measured yet.\n"
    last = {row["recipe"]: row["run"] for row in found}
    body = []
    for recipe, run in last.items():
        rows = [row for row in found if (row["recipe"], row["run"]) == (recipe, run)]
        whole, uniform = (next(row for row in rows if row["contender"] == name) for name in ("16 bits", "nf4"))
        for budget in sorted({row["budget"] for row in rows if row["budget"] is not None}):
            cells = {way: [row for row in rows if row["budget"] == budget and row["contender"].split()[0] == way] for way in WAYS}
            best = {way: min(row["over_16_bits"] for row in few) for way, few in cells.items()}
            least = {way: min(row["divergence"] for row in few) for way, few in cells.items()}
            told = [f"{best[way]:+.2%} ({least[way]:.1e})" for way in WAYS]
            told = [f"**{text}**" if best[way] == min(best.values()) else text for way, text in zip(WAYS, told, strict=True)]
            kept = f"{cells['fxfuse'][0]['kept']} of {whole['linears']}"
            everything = f"{uniform['over_16_bits']:+.2%} ({uniform['divergence']:.1e})"
            trained = f"{recipe}, {whole['parameters'] / 1e6:.0f} M, {whole['steps']} steps"
            body.append([trained, f"{whole['loss']:.4f}", everything, f"{budget:.0%}", kept, *told])
    head = ["recipe, parameters", "16 bits, nats", "all in NF4", "extra bytes", "kept", "fxfuse", "best of 3 random", "first", "last"]
    rows = [row for row in found if row["run"] in last.values()]
    note = "Llamas trained here; held-out loss over that in 16 bits (divergence, nats)"
    return grid(head, body) + f"\n\n{note}; {source(rows)}; `python benchmarks/dynamic_4bit.py`.\n"
