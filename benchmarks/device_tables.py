"""Tables of fine-tuning: under trainers, on several devices, and fused against eager."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.markdown import grid, source
from benchmarks.rows import read

Row = dict[str, Any]
EMPTY = "Not measured yet.\n"
PLACED = {"one": "1 GPU", "ddp": "2, DDP", "fsdp2": "2, FSDP2"}
TRAINERS = {"sft": "SFTTrainer, packed", "dpo": "DPOTrainer"}
CALLED = {"hf": "unfused", "fxfuse": "fused"}


def latest(found: list[Row]) -> list[Row]:
    """Rows of the last run."""
    return [row for row in found if row["run"] == found[-1]["run"]]


def trainers(results: Path) -> str:
    """Tokens a second and memory under a trainer, run by run."""
    found = [row for row in read(results / "trainers.jsonl") if "failed" not in row and row["peak_gib"]]
    if not found:
        return EMPTY
    body = []
    for task, run in dict.fromkeys((row["workload"], row["run"]) for row in found):
        rows = {row["contender"]: row for row in found if (row["workload"], row["run"]) == (task, run)}
        plain = rows.get("trl")
        for contender in sorted(rows, key=lambda name: -rows[name]["tokens_s"]):
            row = rows[contender]
            faster = f"{row['tokens_s'] / plain['tokens_s']:.2f}x" if plain else ""
            batch = row["ms"] / row.get("accumulated", 1)
            body.append([f"{TRAINERS[task]}, {row['commit'][:7]}", row["setup"], contender, f"{batch:.0f}", f"{row['tokens_s']:,.0f}",
                         faster, f"{row['peak_gib']:.1f}", f"{row['first_step_s']:.0f}", f"{row['loss0']:.4f}"])  # fmt: skip
    head = ["trainer, commit", "model", "", "ms a batch", "tokens/s", "x plain TRL", "GiB", "first step, s", "first loss"]
    return grid(head, body) + f"\n\nRandom weights; {source(found)}; `python benchmarks/trainers.py`.\n"


def distributed(results: Path) -> str:
    """Milliseconds, tokens a second, memory; scaling against one GPU of the same contender, speed against unfused on as many."""
    found = [row for row in read(results / "distributed.jsonl") if row["whole"] and row["peak_gib"]]
    if not found:
        return EMPTY
    found = latest(found)
    cells = {(row["mode"], row["placed"], row["contender"]): row for row in found}
    body = []
    order = sorted(cells, key=lambda key: (key[0], list(PLACED).index(key[1]), key[2] != "hf"))
    for mode, placed, contender in order:
        row = cells[mode, placed, contender]
        one, eager = cells.get((mode, "one", contender)), cells.get((mode, placed, "hf"))
        scaling = f"{row['tokens_s'] / one['tokens_s']:.2f}x" if one and placed != "one" else ""
        faster, apart = "", ""
        if eager and contender != "hf":
            faster = f"{eager['ms'] / row['ms']:.2f}x"
            losses = max(abs(a - b) for a, b in zip(row["losses"], eager["losses"], strict=True))
            norms = max(abs(a / b - 1) for a, b in zip(row["grad_norms"], eager["grad_norms"], strict=True))
            apart = f"{losses:.1e}, {norms:.1%}"
        body.append([mode, PLACED[placed], CALLED[contender], f"{row['ms']:.0f}", f"{row['tokens_s']:,.0f}", f"{row['peak_gib']:.1f}",
                     scaling, faster, apart])  # fmt: skip
    head = ["", "on", "", "ms a step", "tokens/s", "GiB a GPU", "x 1 GPU", "x unfused", "loss (nats), gradient norm from unfused"]
    what = found[-1]["workload"]
    return grid(head, body) + f"\n\n{what} a device; {source(found)}; `benchmarks/distributed.py`.\n"


def convergence(results: Path) -> str:
    """End of each curve, and how far fused is from eager in standard deviations between eager's seeds."""
    found = [row for row in read(results / "convergence.jsonl") if row["size"] != "tiny"]
    if not found:
        return EMPTY
    found = latest(found)
    runs = [row for row in found if row["kind"] == "run"]
    apart: Row = next((row["apart"] for row in found if row["kind"] == "verdict"), {})
    limits: Row = next((row["limits"] for row in found if row["kind"] == "verdict"), {})
    body = []
    for row in runs:
        judged = apart.get(str(row["seed"]), {}) if row["contender"] == "fxfuse" else {}
        body.append([f"{CALLED[row['contender']]}, seed {row['seed']}", f"{row['loss0']:.4f}", f"{row['end']:.4f}", f"{row['ms']:.1f}",
                     *[f"{judged[name]:.2f}" if judged else "" for name in ("end", "windows", "paired")]])  # fmt: skip
    head = ["run", "first loss", "mean of the last third", "ms a step",
            *[f"{name} (at most {limits.get(name, 0):.0f})" for name in ("end", "windows", "paired")]]  # fmt: skip
    last = runs[-1]
    model = f"a llama of {last['parameters'] / 1e6:.0f} M pretrained here"
    note = f"QLoRA on docstrings, {last['steps']} steps of {last['tokens']} tokens, {model}. Distances in standard deviations between"
    note += " eager's seeds: of the end, of means over 20 steps, of the same to eager's run of that seed"
    return grid(head, body) + f"\n\n{note}; {source(runs)}; `python benchmarks/convergence.py`.\n"
