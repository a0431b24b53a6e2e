"""Tables of what stands around the matrix products: adapters, dequantization, linear and loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.markdown import grid, source
from benchmarks.rows import read

Row = dict[str, Any]
EMPTY = "Not measured yet.\n"
LORA = ("peft", "addmm_", "thin_first", "thin_kernels", "augmented", "copied", "fxfuse")


def last_run(path: Path, op: str) -> list[Row]:
    """The rows of the last run in which the op was measured."""
    found = [r for r in read(path) if r.get("op") == op]
    return [r for r in found if r["run"] == found[-1]["run"]]


def lora(results: Path) -> str:
    """By how much each way of forming a linear with adapters exceeds its base matmuls."""
    rows = [r for r in last_run(results / "lora.jsonl", "lora") if "forward_ms" in r]
    if not rows:
        return EMPTY
    shapes: dict[str, dict[str, Row]] = {}
    for row in rows:
        shapes.setdefault(row["shape"], {})[row["contender"]] = row
    body = []
    for shape, cells in shapes.items():
        for mode, told in (("forward", "fwd"), ("both", "fwd+bwd")):
            over = [f"{cells[n][mode + '_over_base']:+.0%}" if n in cells else "" for n in LORA]
            body.append([shape, told, f"{cells['base'][mode + '_ms']:.3f}", *over])
    head = ["tokens x inputs x outputs", "", "base, ms", *LORA]
    note = f"Over the base: forward, and dX of the frozen weights. Rank {rows[-1]['rank']}, bf16"
    return grid(head, body) + f"\n\n{note}; {source(rows)}; `python benchmarks/lora.py`.\n"


WAYS = ("thin first", "whole (room 16)", "whole (room 64)", "whole, the tail stays (room 64)")


def lora_pieces(results: Path) -> str:
    """The same beside matmuls that run one after another, as in a training step: a whole linear by way, over its base."""
    rows = last_run(results / "lora_pieces.jsonl", "lora_pieces")
    if not rows:
        return EMPTY
    cells = {(r["shape"], r["direction"], r["contender"]): r["ms"] for r in rows}
    body = []
    for shape in dict.fromkeys(r["shape"] for r in rows):
        sums = {way: (cells[shape, "forward", way], cells[shape, "backward", way]) for way in ("base", *WAYS)}
        for told, parts in (("fwd", 1), ("fwd+bwd", 2)):
            base = sum(sums["base"][:parts])
            body.append([shape, told, f"{base:.3f}", *(f"{sum(sums[way][:parts]) / base - 1:+.1%}" for way in WAYS)])
    head = ["tokens x inputs x outputs", "", "base, ms", *WAYS]
    note = f"Room: elements between the rows' ends and the next rows. Rank {rows[-1]['rank']}, bf16"
    return grid(head, body) + f"\n\n{note}; {source(rows)}; `python benchmarks/lora.py --pieces`.\n"


def dequantize(results: Path) -> str:
    """Our one launch against bitsandbytes' two."""
    rows = [r for r in last_run(results / "dequantize.jsonl", "dequantize_4bit") if "ms" in r]
    if not rows:
        return EMPTY
    cases: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = (row["shape"], row["code"], row["blocksize"], row["nested"], row["dtype"])
        cases.setdefault(key, []).append(row)
    body = []
    for (shape, code, blocksize, nested, dtype), found in cases.items():
        peer = next(r for r in found if r["contender"] == "bitsandbytes")
        plain = [r for r in found if r["contender"].startswith("fxfuse") and not r.get("room")]
        roomy = [r for r in found if r["contender"].startswith("fxfuse") and r.get("room")]
        if not plain:
            continue
        ours = min(plain, key=lambda r: r["ms"])
        beside = min((r["ms"] for r in roomy), default=None)
        exact = all(r["exact"] for r in plain + roomy)
        body.append(
            [
                shape,
                f"{code} {blocksize}{' nested' if nested else ''}, {dtype}",
                f"{ours['ms'] * 1e3:.1f} ({ours['share_of_copy']:.0%})",
                f"{beside * 1e3:.1f}" if beside else "",
                f"{peer['ms'] * 1e3:.1f} ({peer['share_of_copy']:.0%})",
                f"{peer['ms'] / ours['ms']:.2f}",
                f"{ours['host_us']:.0f}, {peer['host_us']:.0f}",
                "yes" if exact else "**no**",
            ]
        )
    head = ["weight", "stored", "fxfuse, µs (of copy)", "into wider rows", "bitsandbytes, µs", "x faster", "host, µs", "bit for bit"]
    return grid(head, body) + f"\n\n{source(rows)}; `python benchmarks/dequantize.py`.\n"


def linear_loss(results: Path) -> str:
    """Milliseconds, times the products alone, and memory beyond the inputs."""
    rows = [r for r in last_run(results / "linear_loss.jsonl", "linear_loss") if "ms" in r]
    if not rows:
        return EMPTY
    contenders = list(dict.fromkeys(r["contender"] for r in rows))
    cases: dict[tuple[str, bool], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row["case"], row["trained"]), {})[row["contender"]] = row
    body = []
    for (case, trained), cells in cases.items():
        line = [case, "trained" if trained else "frozen"]
        for name in contenders:
            row = cells.get(name, {})
            memory = f" / {row['extra_gib']:.2f}" if row.get("extra_gib") is not None else ""
            over = f" ({row['over_gemms']:.2f}x)" if row.get("over_gemms") else ""
            line.append(f"{row['ms']:.1f}{over}{memory}" if row else "")
        body.append(line)
    head = ["loss", "head", *[f"{name}, ms (x products) / GiB" for name in contenders]]
    note = f"{rows[-1]['shape']}, bf16, forward and backward; GiB beyond the inputs, a trained head's gradient included"
    return grid(head, body) + f"\n\n{note}; {source(rows)}; `python benchmarks/linear_loss.py`.\n"
