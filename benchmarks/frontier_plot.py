"""The frontier as a picture: milliseconds of a step over its peak memory, one panel a workload, from frontier.jsonl.

python benchmarks/frontier_plot.py --out docs/frontier.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from benchmarks.frontier_tables import Row, frontier_of, gib, measured, shown  # noqa: E402
from benchmarks.rows import RESULTS, read  # noqa: E402
from benchmarks.step_tables import is_ours  # noqa: E402

INK, QUIET, OURS = "#222222", "#8a8a8a", "#b3261e"
# (marker, colour) by the base of a peer's name; readable in grey, and by those who do not tell red from green
PEERS = {"unsloth": ("s", "#0b5fa5"), "liger": ("^", "#6b4c9a"), "hf+regional": ("D", "#5f6b1f"), "hf": ("o", "#555555")}
SETTINGS = {"checkpointing=on": "checkpoint", "checkpointing=off": "no checkpoint", "checkpointing=offload": "offload"}


def draw(panels: list[list[Row]], path: Path) -> None:
    """Write the picture. Needs matplotlib, which the package itself does not."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 9, "axes.edgecolor": QUIET, "text.color": INK, "axes.labelcolor": INK,
                            "xtick.color": INK, "ytick.color": INK, "svg.hashsalt": "fxfuse"})
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.1), squeeze=False, layout="constrained")
    for axis, found in zip(axes[0], panels, strict=True):
        _panel(axis, measured(found))
    axes[0][0].set_ylabel("milliseconds a step")
    figure.savefig(path, dpi=160, metadata={"Software": None})
    pyplot.close(figure)


def _panel(axis: Any, rows: list[Row]) -> None:
    ours = [row for row in rows if is_ours(row)]
    best = frontier_of(ours)
    axis.step([gib(r) for r in best], [r["ms"] for r in best], where="post", color=OURS, linewidth=1.2, zorder=2)
    axis.plot([gib(r) for r in ours], [r["ms"] for r in ours], "o", color=OURS, markersize=5, zorder=3)
    _label(axis, best[0], "fxfuse", OURS)
    for row in rows:
        if not is_ours(row):
            marker, colour = PEERS.get(row["contender"].partition("[")[0], ("x", QUIET))
            axis.plot(gib(row), row["ms"], marker, color=colour, markersize=5, markerfacecolor="white", zorder=3)
            _label(axis, row, _name(row), colour)
    axis.set_xscale("log", base=2)
    low, high = min(map(gib, rows)), max(map(gib, rows))
    ticks = [t for t in (6, 8, 12, 16, 24, 32, 48, 64, 96, 128) if low * 0.9 <= t <= high * 1.2] or [low, high]
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.minorticks_off()
    axis.set_xlim(low * 0.92, high * 1.45)
    axis.set_ylim(0, max(r["ms"] for r in rows) * 1.08)
    axis.set_xlabel("peak memory, GiB")
    axis.set_title(f"{rows[0]['workload']}: {rows[0]['setup'].rpartition(',')[0]}", fontsize=9, loc="left")
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.6, zorder=0)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _name(row: Row) -> str:
    base, _, options = row["contender"].partition("[")
    setting = SETTINGS.get(options.rstrip("]"), "")
    return f"{base}, {setting}" if setting else base


def _label(axis: Any, row: Row, text: str, colour: str) -> None:
    axis.annotate(text, (gib(row), row["ms"]), xytext=(5, 3), textcoords="offset points", color=colour, fontsize=7.5)


def by_workload(runs: list[list[Row]]) -> list[list[Row]]:
    """The rows of the runs shown, a panel a workload; of a contender that several measured, those of the last."""
    panels: dict[str, dict[str, Row]] = {}
    for row in (row for found in runs for row in measured(found)):
        panels.setdefault(row["workload"], {})[row["contender"]] = row
    return [list(rows.values()) for rows in panels.values()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "frontier.jsonl")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "frontier.png")
    parser.add_argument("--any", action="store_true", help="runs of cut models too")
    args = parser.parse_args()
    everything = read(args.results)
    if args.any:
        everything = [{**row, "whole": True} for row in everything]
    panels = by_workload(shown(everything))
    if not panels:
        sys.stdout.write("no run with fxfuse and a peer whose anchors hold: nothing is drawn\n")
        return 1
    draw(panels, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
