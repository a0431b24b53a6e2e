"""The frontier of a memory plan as a picture in a file: SVG by ourselves, PNG (or what else it writes) by matplotlib."""

from __future__ import annotations

from pathlib import Path

from fxfuse.memory.plan import MemoryPlan
from fxfuse.reporting.frontier_svg import GIB, STYLE, drawing


def write(plan: MemoryPlan, path: str | Path) -> Path:
    """Draw milliseconds of a step over peak memory. ValueError where there is nothing to draw, or nothing to draw it with."""
    target = Path(path)
    svg = drawing(plan)
    if not svg:
        raise ValueError("this plan knows no other budget than its own: there is no frontier to draw")
    if target.suffix.lower() == ".svg":
        styled = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(">", f"><style>{STYLE}</style>", 1)
        target.write_text(styled, encoding="utf-8")
        return target
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError(f"{target.name} needs matplotlib, which is not installed; a name that ends in .svg does not") from error
    matplotlib.use("Agg")
    _with_matplotlib(plan, target)
    return target


def _with_matplotlib(plan: MemoryPlan, target: Path) -> None:
    from matplotlib import pyplot

    points = sorted({*plan.frontier, (plan.predicted_peak, plan.extra_ms)})
    fastest = plan.step_ms - plan.extra_ms
    figure, axis = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    axis.step([peak / GIB for peak, _ in points], [fastest + ms for _, ms in points], where="post", color="#b3261e", linewidth=1.2)
    axis.plot([peak / GIB for peak, _ in points], [fastest + ms for _, ms in points], "o", color="#b3261e", markersize=4)
    axis.plot(plan.predicted_peak / GIB, plan.step_ms, "o", color="#b3261e", markersize=10, markerfacecolor="none")
    axis.annotate("this plan", (plan.predicted_peak / GIB, plan.step_ms), xytext=(7, 7), textcoords="offset points")
    axis.set(xlabel="peak memory, GiB", ylabel="milliseconds a step", title=f"predicted; {plan.rates}")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=160)
    pyplot.close(figure)
