"""Tables and verdict of frontier.jsonl: who stands where in time and memory, and whether any peer stands below us."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.markdown import grid, source
from benchmarks.rows import read
from benchmarks.step_tables import EMPTY, anchors_off, is_ours

Row = dict[str, Any]
NOISE = 0.015  # differences under this are ties (research/baselines.md)
PREDICTION = 0.05  # how far a predicted peak may be off


def gib(row: Row) -> float:
    """Peak memory of a step; on a CPU the bytes kept for its backward."""
    return row.get("peak_gib", row.get("saved_gib", float("nan")))


def measured(found: Iterable[Row]) -> list[Row]:
    """Rows that have a time and a peak, by memory."""
    return sorted((r for r in found if r["kind"] == "step" and "ms" in r and gib(r) == gib(r)), key=gib)


def frontier_of(points: Iterable[Row]) -> list[Row]:
    """Those that no other is at once faster and smaller than, by memory."""
    best: list[Row] = []
    for row in sorted(points, key=lambda r: (gib(r), r["ms"])):
        if not best or row["ms"] < best[-1]["ms"]:
            best.append(row)
    return best


def below(peer: Row, ours: Iterable[Row], noise: float = NOISE) -> bool:
    """Is a peer's point one that none of ours is as fast as in as little memory, beyond noise."""
    reached = (o["ms"] <= peer["ms"] * (1 + noise) and gib(o) <= gib(peer) * (1 + noise) for o in ours)
    return not any(reached)


def prediction_error(row: Row) -> float | None:
    """(measured - predicted) / measured peak of a row that has both."""
    if "predicted_gib" not in row or "peak_gib" not in row:
        return None
    return (row["peak_gib"] - row["predicted_gib"]) / row["peak_gib"]


def complaints(found: list[Row]) -> list[str]:
    """What the acceptance asks and these rows of one run do not show."""
    told = []
    for workload in dict.fromkeys(r["workload"] for r in found):
        rows = measured(r for r in found if r["workload"] == workload)
        ours = [r for r in rows if is_ours(r)]
        for peer in (r for r in rows if not is_ours(r)):
            if ours and below(peer, ours):
                told.append(f"BELOW OURS {workload} {peer['contender']} {peer['ms']:.1f} ms at {gib(peer):.2f} GiB")
        for row in ours:
            error = prediction_error(row)
            if error is not None and abs(error) > PREDICTION:
                told.append(f"PREDICTION {workload} {row['contender']} {row['predicted_gib']:.2f} of {gib(row):.2f} GiB")
        told += [f"OVER BUDGET {workload} {r['contender']} {gib(r):.2f} GiB" for r in ours if _over(r, gib(r))]
        told += [f"OVER BUDGET in its first step {workload} {r['contender']} {r['first_peak_gib']:.2f} GiB" for r in ours
                 if _over(r, r.get("first_peak_gib", 0.0))]
    return told + [f"ANCHOR OFF {line}" for line in anchors_off(measured(found))]


def _over(row: Row, peak: float) -> bool:
    budget = str(row.get("memory", ""))
    return budget.endswith("GiB") and peak > float(budget.removesuffix("GiB"))


def shown(everything: list[Row]) -> list[list[Row]]:
    """For each workload the rows of the run with most points, and of the last one if that is another; of runs that have ours and
    a peer, whole models, and their anchors where they were."""
    by: dict[str, dict[str, list[Row]]] = {}
    for row in everything:
        if row["kind"] == "step" and (row.get("whole") or "failed" in row):
            by.setdefault(row["workload"], {}).setdefault(row["run"], []).append(row)
    chosen = []
    for workload in sorted(by):
        usable = [found for found in by[workload].values() if _usable(found)]
        widest = max(usable, key=lambda found: len(measured(found)), default=None)
        chosen += [found for found in usable if found is widest or found is usable[-1]]
    return chosen


def _usable(found: list[Row]) -> bool:
    rows = measured(found)
    return len({is_ours(r) for r in rows}) == 2 and not anchors_off(rows)


def frontier(results: Path) -> str:
    """Every point of the runs shown, by memory; those that nothing is below are bold."""
    chosen = shown(read(results / "frontier.jsonl"))
    if not chosen:
        return EMPTY
    body, verdicts = [], []
    for found in chosen:
        rows = measured(found)
        best = frontier_of(rows)
        body += [_line(row, row in best) for row in rows]
        at = f", {rows[0]['commit'][:7]}"
        beaten = [r["contender"] for r in rows if not is_ours(r) and below(r, [o for o in rows if is_ours(o)])]
        errors = [abs(e) for e in map(prediction_error, rows) if e is not None]
        verdicts.append(
            f"{rows[0]['workload']} ({rows[0]['setup'].split(', ')[0]}{at}): peers below our frontier: {', '.join(beaten) or 'none'}"
            + (f"; predicted peaks within {max(errors):.1%}" if errors else ""))
    head = ["workload, commit", "contender", "GiB", "ms", "tokens/s", "predicted GiB", "blocks by point"]
    everything = [row for found in chosen for row in found]
    return grid(head, body) + "\n\n" + ". ".join(verdicts) + f". {source(everything)}; `python benchmarks/frontier.py`.\n"


def _line(row: Row, best: bool) -> list[str]:
    error = prediction_error(row)
    points = ", ".join(f"{count} x {name}" for name, count in row.get("points", {}).items())
    name = f"**{row['contender']}**" if best else row["contender"]
    predicted = f"{row['predicted_gib']:.2f} ({error:+.1%})" if error is not None else ""
    measured_at = f"{row['workload']}, {row['commit'][:7]}"
    return [measured_at, name, f"{gib(row):.2f}", f"{row['ms']:.1f}", f"{row['tokens_s']:,.0f}", predicted, points]


def longest(results: Path) -> str:
    """Of the last run under each cap in which two contenders or more ran: the longest sequences, and time a token at each that ran."""
    found = [r for r in read(results / "frontier.jsonl") if r["kind"] == "longest"]
    if not found:
        return EMPTY
    body, shown = [], []
    for cap in sorted({r["cap_gib"] for r in found}):
        trials = [r for r in found if r["cap_gib"] == cap and "length" in r]
        together = [run for run in dict.fromkeys(r["run"] for r in trials) if len(_fitted(trials, run)) > 1]
        if not together:
            continue
        fitted = _fitted(trials, together[-1])
        shown += [r for r in trials if r["run"] == together[-1]]
        for name, rows in sorted(fitted.items(), reverse=True):
            failed = [r["length"] for r in shown if r["cap_gib"] == cap and r["contender"] == name and "failed" in r]
            at = ", ".join(f"{rows[length]['us_a_token']:.1f} at {length:,}" for length in sorted(rows))
            body.append([f"{cap:.0f} GiB", name, f"{max(rows):,}", f"{min(failed):,}" if failed else "", at, rows[max(rows)]["setup"]])
    head = ["cap", "contender", "longest that ran, tokens", "shortest that did not fit", "µs a token", "model"]
    return grid(head, body) + f"\n\n{source(shown)}; `python benchmarks/frontier.py --longest`.\n"


def _fitted(trials: Iterable[Row], run: str) -> dict[str, dict[int, Row]]:
    """The trials of a run that fitted, by contender and length; of a length's steps the last."""
    fitted: dict[str, dict[int, Row]] = {}
    for row in trials:
        if row["run"] == run and "failed" not in row:
            fitted.setdefault(row["contender"], {})[row["length"]] = row
    return fitted


def summary(found: list[Row]) -> str:
    """For the terminal: every row of a run."""
    lines = []
    for row in found:
        name = f"{row['workload']:5} {row['contender']:34}"
        if row["kind"] == "longest":
            lines.append(f"{name} {_trial(row)}")
        elif "failed" in row:
            lines.append(f"{name} FAILED {row['failed'][:300]} (at: {row.get('stage', '')})")
        elif row["kind"] == "step":
            plan = ""
            if "predicted_gib" in row:
                plan = f" predicted {row['predicted_gib']:.3f} {row.get('points')} parts {row.get('parts_gib')}"
            lines.append(f"{name} {row['ms']:8.1f} ms [{row['ms_min']:.1f} {row['ms_max']:.1f}] {gib(row):7.3f} GiB "
                         f"(first {row.get('first_peak_gib', 0):.2f}) first {row['first_step_s']:.1f} s loss0 {row['loss0']:.4f} "
                         f"norm {row['grad_norm']:.4f}{plan} {row.get('report_errors') or ''}")
    return "\n".join(lines)


def _trial(row: Row) -> str:
    if "longest" in row:
        return f"cap {row['cap_gib']} GiB: longest {row['longest']}"
    told = f"FAILED {row['failed'][:160]}" if "failed" in row else f"{row['ms']:.0f} ms, {row['us_a_token']:.1f} us a token"
    planned = f" predicted {row['predicted_gib']} {row['points']}" if "points" in row else ""
    return (f"cap {row['cap_gib']} GiB: {row['length']} tokens: {told} peak {row.get('peak_gib', 0)} + {row.get('left_out_gib', 0)}"
            f"{planned} host {row.get('host_gib', 0)}")
