"""Tables of training steps from steps.jsonl: README, docs, and the summary that steps.py ends with."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.markdown import grid, source
from benchmarks.rows import read

Row = dict[str, Any]
# Milliseconds of whole steps on this machine as first measured. A run whose anchors are further off is not shown.
ANCHORS = {
    ("W1", "hf"): 921.0,
    ("W1", "unsloth"): 723.4,
    ("W2", "hf"): 1082.8,
    ("W2", "unsloth"): 768.5,
    ("W2b", "hf"): 768.4,
    ("W2b", "unsloth"): 538.9,
    ("W3", "hf"): 338.9,
    ("W3", "liger"): 260.9,
    ("W4", "hf"): 857.6,
    ("W4", "hf+regional"): 416.6,
    ("W5", "hf"): 87.0,
    ("W5", "hf+regional"): 47.6,
}
ANCHOR_LIMIT = 0.05
# fxfuse once its attention is chosen; without the variable a process compiles the other way beside the steps that are timed.
SETTLED = "fxfuse[FXFUSE_ATTENTION=measure]"
FLASH4 = "FLASH4=1"  # an option of contenders that find flash-attn-4: they have a table of their own
EMPTY = "Not measured yet.\n"


def is_ours(row: Row) -> bool:
    return row["contender"].startswith("fxfuse")


def anchors_off(found: Iterable[Row]) -> list[str]:
    """Anchor rows further than 5% from where they were."""
    off = []
    for row in found:
        then = ANCHORS.get((row["workload"], row["contender"]))
        if then and row.get("whole") and "ms" in row and abs(row["ms"] / then - 1) > ANCHOR_LIMIT:
            off.append(f"{row['workload']} {row['contender']} {row['ms']:.1f} ms, was {then:.1f}")
    return off


class Run:
    """One workload in one run."""

    def __init__(self, workload: str, found: list[Row]) -> None:
        self.workload, self.rows = workload, found
        steps = [r for r in found if r["kind"] == "step"]
        self.timed = {r["contender"]: r for r in steps if "ms" in r and not r["repeat"]}
        self.failed = {r["contender"]: r for r in steps if "failed" in r and not r["repeat"]}
        self.warm = {r["contender"]: r["first_step_s"] for r in steps if "ms" in r and r["repeat"]}
        self.profiles = {r["contender"]: r for r in found if r["kind"] == "profile"}
        self.floor: float | None = None

    @property
    def ours(self) -> Row | None:
        return self.timed.get(SETTLED, self.timed.get("fxfuse"))

    @property
    def peers(self) -> dict[str, Row]:
        return {name: r for name, r in self.timed.items() if not is_ours(r) and FLASH4 not in name}

    @property
    def with_flash4(self) -> list[Row]:
        """The fastest of ours that finds flash-attn-4, and the fastest peer, if there are."""
        found = sorted((r for name, r in self.timed.items() if FLASH4 in name), key=lambda r: r["ms"])
        return [next((r for r in found if is_ours(r) == ours), {}) for ours in (True, False)]

    def best_peer(self) -> Row | None:
        return min(self.peers.values(), key=lambda r: r["ms"], default=None)

    def smallest_peer(self) -> Row | None:
        return min(self.peers.values(), key=lambda r: r.get("peak_gib", float("inf")), default=None)


def runs(everything: list[Row]) -> dict[str, list[Run]]:
    """By workload, in the order measured; whole models only. The floor is the run's own, else the last one measured."""
    found: dict[str, dict[str, list[Row]]] = {}
    floors: dict[tuple[str, str], float] = {}
    for row in everything:
        if row["kind"] == "floor":
            floors[row["workload"], row["run"]] = floors[row["workload"], ""] = row["ms"]
        elif row["kind"] in ("step", "profile") and (row.get("whole") or "failed" in row):
            found.setdefault(row["workload"], {}).setdefault(row["run"], []).append(row)
    made = {w: [Run(w, rows) for rows in by_run.values()] for w, by_run in found.items()}
    for w, its in made.items():
        for run in its:
            run.floor = floors.get((w, run.rows[0]["run"]), floors.get((w, "")))
    return made


def shown(everything: list[Row]) -> list[Run]:
    """For each workload its last run that has fxfuse, a peer, and its anchors where they were."""
    chosen = []
    for candidates in runs(everything).values():
        usable = [r for r in candidates if r.ours and r.peers and not anchors_off(r.timed.values())]
        if usable:
            chosen.append(usable[-1])
    return sorted(chosen, key=lambda run: run.workload)


def steps(results: Path) -> str:
    """One line a workload: ours, the fastest peer of the same run, the ratio, the floor."""
    chosen = shown(read(results / "steps.jsonl"))
    if not chosen:
        return EMPTY
    body = []
    for run in chosen:
        ours, best, small = run.ours, run.best_peer(), run.smallest_peer()
        assert ours
        assert best
        assert small
        body.append(
            [
                f"{run.workload}: {ours['setup']}",
                f"{ours['ms']:.0f} / {ours['peak_gib']:.1f}{' (chosen)' if ours['contender'] == SETTLED else ''}",
                f"{best['contender']} {best['ms']:.0f} / {best['peak_gib']:.1f}",
                f"**{best['ms'] / ours['ms']:.2f}**",
                f"{small['contender']} {small['ms']:.0f} / {small['peak_gib']:.1f}",
                f"{ours['ms'] / run.floor:.2f}" if run.floor else "",
                _launches(run, ours["contender"]),
            ]
        )
    head = [
        "workload",
        "fxfuse, ms / GiB",
        "fastest peer",
        "x faster",
        "peer with least memory",
        "x the floor",
        "launches",
    ]
    note = "The floor: matrix products and attention alone, each at its own best rate on this machine. "
    if any(run.ours and run.ours["contender"] == SETTLED for run in chosen):
        note += "Chosen: the attention was chosen by measurement before (`FXFUSE_ATTENTION=measure`). "
    return (
        grid(head, body)
        + f"\n\n{note}{source([r for run in chosen for r in run.rows])}; `python benchmarks/steps.py`.\n"
    )


def steps_flash4(results: Path) -> str:
    """Of each workload the last run in which flash-attn-4 was there: with it and without it, ours and the fastest peer."""
    usable = [[r for r in found if r.ours and r.with_flash4[0]] for found in runs(read(results / "steps.jsonl")).values()]
    chosen = sorted((found[-1] for found in usable if found), key=lambda run: run.workload)
    if not chosen:
        return EMPTY
    body = []
    for run in chosen:
        ours, peer = run.with_flash4
        body.append([run.workload, *map(_with_spread, (ours, run.ours, peer, run.best_peer()))])
    head = ["workload", "fxfuse with flash-attn-4, ms", "without", "fastest peer with it", "without"]
    return grid(head, body) + f"\n\n{source([r for run in chosen for r in run.rows])}; `python benchmarks/steps.py`.\n"


def _with_spread(row: Row | None) -> str:
    """A peer by its name; milliseconds of the median step, the fastest and the slowest; nothing for no row."""
    if not row:
        return ""
    name = "" if is_ours(row) else f"{row['contender'].split('[')[0]} "
    return f"{name}{row['ms']:.1f} [{row['ms_min']:.0f}-{row['ms_max']:.0f}]"


def _launches(run: Run, contender: str) -> str:
    profile = run.profiles.get(contender)
    return f"{profile['launches']:,}" if profile else ""


def steps_all(results: Path) -> str:
    """Every contender of the runs shown."""
    chosen = shown(read(results / "steps.jsonl"))
    if not chosen:
        return EMPTY
    body = [line for run in chosen for line in _lines(run)]
    return (
        grid(list(_COLUMNS), body)
        + f"\n\n{source([r for run in chosen for r in run.rows])}; `python benchmarks/steps.py`.\n"
    )


_COLUMNS = (
    "workload",
    "contender",
    "ms",
    "min-max",
    "tokens/s",
    "GiB",
    "reserved",
    "first step, s (warm)",
    "x fxfuse",
    "x floor",
    "launches",
    "idle, ms",
    "loss 0",
    "gradient norm",
)


def _lines(run: Run) -> list[list[str]]:
    ours = run.ours
    lines = []
    for name, row in sorted(run.timed.items(), key=lambda item: item[1]["ms"]):
        profile = run.profiles.get(name, {})
        warm = f" ({run.warm[name]:.1f})" if name in run.warm else ""
        lines.append(
            [
                run.workload,
                f"**{name}**" if is_ours(row) else name,
                f"{row['ms']:.1f}",
                f"{row['ms_min']:.1f}-{row['ms_max']:.1f}",
                f"{row['tokens_s']:,.0f}",
                f"{row.get('peak_gib', 0):.1f}",
                f"{row.get('reserved_gib', 0):.1f}",
                f"{row['first_step_s']:.1f}{warm}",
                f"{row['ms'] / ours['ms']:.2f}" if ours else "",
                f"{row['ms'] / run.floor:.2f}" if run.floor else "",
                f"{profile['launches']:,}" if profile else "",
                f"{profile['idle_ms']:.0f}" if profile else "",
                f"{row['loss0']:.4f}",
                f"{row['grad_norm']:.4f}",
            ]
        )
    for name, row in run.failed.items():
        if name not in run.timed:
            at = f" ({row['stage']})" if row.get("stage") else ""
            lines.append(
                [run.workload, name, f"failed: {row['failed'][:120]}{at}", *[""] * (len(_COLUMNS) - 3)]
            )
    return lines


def profiles(results: Path) -> str:
    """Where a step's time goes, by class of kernel."""
    chosen = [run for run in shown(read(results / "steps.jsonl")) if run.profiles]
    if not chosen:
        return EMPTY
    classes = list(dict.fromkeys(c for run in chosen for p in run.profiles.values() for c in p["classes"]))
    body = [
        [
            run.workload,
            name,
            *[f"{p['classes'][c]['ms']:.1f}" if c in p["classes"] else "" for c in classes],
            f"{p['thin_matmul_ms']:.1f}",
            f"{p['idle_ms']:.1f}",
            f"{p['launches']:,}",
        ]
        for run in chosen
        for name, p in run.profiles.items()
    ]
    head = [
        "workload",
        "contender",
        *[f"{c}, ms" for c in classes],
        "of it matmuls < 60 µs",
        "idle, ms",
        "launches",
    ]
    return grid(head, body) + "\n\nOne profiled step; classes by kernel name.\n"


def parity(results: Path) -> str:
    """Losses and gradient norms, step by step, beside eager's, and both beside float32 where it ran."""
    found = [r for r in read(results / "steps.jsonl") if r["kind"] == "parity" and "losses" in r]
    by: dict[tuple[str, str], dict[str, Row]] = {}
    for row in found:
        by.setdefault((row["setup"], row["run"]), {})[row["contender"]] = row
    last = {setup: rows for (setup, _), rows in by.items() if "hf" in rows and len(rows) > 1}
    if not last:
        return EMPTY
    body = []
    for setup, rows in last.items():
        for name, row in rows.items():
            if name in ("hf", "hf-exact"):
                continue
            told = [f"{d:.1e}" for d in differences(row, rows["hf"])]
            errors = (
                [f"{e:.2f}" for e in error_ratios(row, rows["hf"], rows["hf-exact"])]
                if "hf-exact" in rows
                else ["", ""]
            )
            body.append([setup, name, f"0-{len(row['losses']) - 1}", *told, *errors])
    head = [
        "workload",
        "contender",
        "steps",
        "loss: largest relative difference to hf",
        "gradient norm",
        "loss: error to float32, x hf's",
        "gradient norm",
    ]
    return grid(head, body) + f"\n\n{source(found)}; `python benchmarks/steps.py --parity 20`.\n"


def error_ratios(row: Row, eager: Row, exact: Row) -> tuple[float, float]:
    """Root mean square error over the steps, ours over eager's: of the losses, and of the gradient norms."""

    def rms(a: list[float], b: list[float]) -> float:
        return (sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a)) ** 0.5

    def ratio(key: str) -> float:
        return rms(row[key], exact[key]) / max(rms(eager[key], exact[key]), 1e-12)

    return ratio("losses"), ratio("grad_norms")


def differences(row: Row, eager: Row) -> tuple[float, float]:
    """Largest relative difference of the losses, and of the gradient norms, over the steps."""

    def worst(ours: list[float], theirs: list[float]) -> float:
        return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))

    return worst(row["losses"], eager["losses"]), worst(row["grad_norms"], eager["grad_norms"])


def summary(found: list[Row]) -> str:
    """For the terminal: every row of a run, whatever its size."""
    lines: list[str] = []
    eager = {r["workload"]: r for r in found if r["contender"] == "hf" and "loss0" in r}
    profiled = {(r["workload"], r["contender"], r["repeat"]): r for r in found if r["kind"] == "profile"}
    for row in (r for r in found if r["kind"] in ("step", "parity")):
        name = f"{row['workload']:4} {row['contender']:26} r{row['repeat']}"
        if "failed" in row:
            lines.append(f"{name} FAILED {row['failed'][:200]} (at: {row.get('stage', '')})")
        elif row["kind"] == "step":
            lines.append(
                f"{name} {_one_line(row, profiled.get((row['workload'], row['contender'], row['repeat'])))}"
            )
        else:
            beside = eager.get(row["workload"], row)
            loss, norm = differences(row, beside) if "losses" in beside else (0.0, 0.0)
            lines.append(
                f"{name} steps 0-{len(row['losses']) - 1}: loss within {loss:.1e} of hf, gradient norm within {norm:.1e}"
            )
        if "fused" in row:
            lines.append(
                f"     fused {row['fused']} declined {list(row['declined'])[:6]} errors {row['report_errors'][:3]}"
            )
    return "\n".join(
        [*lines, *(f"ANCHOR OFF {line}" for line in anchors_off(r for r in found if r["kind"] == "step"))]
    )


def _one_line(row: Row, profile: Row | None) -> str:
    text = (
        f"{row['ms']:8.1f} ms [{row['ms_min']:.1f} {row['ms_max']:.1f}] {row['tokens_s']:8.0f} tok/s "
        f"{row.get('peak_gib', 0):6.2f} GiB ({row.get('reserved_gib', 0):.2f}) first {row['first_step_s']:.1f} s "
        f"loss0 {row['loss0']:.5f} norm {row['grad_norm']:.5f} breaks {row['graph_breaks']}"
    )
    if profile:
        classes = " ".join(f"{name} {c['ms']:.0f}" for name, c in profile["classes"].items())
        text += f"\n     {profile['launches']} launches, busy {profile['busy_ms']:.0f}, idle {profile['idle_ms']:.0f} ms: {classes}"
    return text
