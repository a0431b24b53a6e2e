"""The frontier of a memory plan as a drawing for the report's page: milliseconds of a step over peak memory. No script, no library."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import floor, log10

from fxfuse.memory.plan import MemoryPlan

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 20, 18, 44
GIB = 1 << 30
MIB = 1 << 20


def drawing(plan: MemoryPlan) -> str:
    """An ``svg`` element; nothing where a plan knows no other budget than its own."""
    points = sorted({*plan.frontier, (plan.predicted_peak, plan.extra_ms)})
    if len(points) < 2:
        return ""
    fastest = plan.step_ms - plan.extra_ms
    unit, name = (GIB, "GiB") if points[-1][0] >= GIB else (MIB, "MiB")
    spots = [(peak / unit, fastest + extra) for peak, extra in points]
    chosen = plan.predicted_peak / unit, plan.step_ms
    x, y = _Scale([p for p, _ in spots], LEFT, WIDTH - RIGHT), _Scale([ms for _, ms in spots], HEIGHT - BOTTOM, TOP)
    marks = [_circle(x(peak), y(ms), f"{peak:.2f} {name}, {ms:.0f} ms", "plan" if (peak, ms) == chosen else "other")
             for peak, ms in spots]
    parts = [*_axes(x, y, name), _steps([(x(peak), y(ms)) for peak, ms in spots]), *marks]
    parts.append(_words(x(chosen[0]), y(chosen[1]) - 9, f"this plan: {chosen[0]:.1f} {name}", "middle"))
    label = escape(f"predicted time of a step over its peak memory, {len(spots)} plans")
    return f'<svg class="frontier" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">' + "".join(parts) + "</svg>"


STYLE = """
svg.frontier { max-width: 42rem; width: 100%; font: 12px system-ui, sans-serif }
svg.frontier text { fill: currentColor }
svg.frontier .grid { stroke: #8884; stroke-width: 1 }
svg.frontier .steps { fill: none; stroke: #b3261e; stroke-width: 1.5 }
svg.frontier .other { fill: #b3261e }
svg.frontier .plan { fill: none; stroke: #b3261e; stroke-width: 3 }
"""


class _Scale:
    """From values to pixels, with room at both ends, and round numbers to mark."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        low, high = min(values), max(values)
        room = (high - low or abs(high) or 1.0) * 0.08
        self.low, self.high, self.start, self.end = max(low - room, 0.0), high + room, start, end

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Four to nine multiples of 1, 2 or 5 times a power of ten."""
        rough = (self.high - self.low) / 6
        power = 10.0 ** floor(log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
        first = int(self.low / step) + 1
        return [round(step * i, 10) for i in range(first, int(self.high / step) + 1)]


def _axes(x: _Scale, y: _Scale, unit: str) -> list[str]:
    parts = []
    for tick in y.ticks():
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(_words(LEFT - 8, y(tick) + 4, f"{tick:g}", "end"))
    for tick in x.ticks():
        parts.append(_words(x(tick), HEIGHT - BOTTOM + 18, f"{tick:g}", "middle"))
    parts.append(_words((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, f"peak memory, {unit}", "middle"))
    parts.append(_words(LEFT - 8, TOP - 5, "ms", "end"))
    return parts


def _steps(spots: Sequence[tuple[float, float]]) -> str:
    """Down from left to right: between two plans, the smaller one is what fits."""
    path = f"M{spots[0][0]:.1f},{spots[0][1]:.1f}"
    path += "".join(f"H{px:.1f}V{py:.1f}" for px, py in spots[1:])
    return f'<path class="steps" d="{path}"/>'


def _circle(px: float, py: float, told: str, kind: str) -> str:
    radius = 6 if kind == "plan" else 3.5
    return f'<circle class="{kind}" cx="{px:.1f}" cy="{py:.1f}" r="{radius}"><title>{escape(told)}</title></circle>'


def _words(px: float, py: float, text: str, anchor: str) -> str:
    return f'<text x="{px:.1f}" y="{py:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
