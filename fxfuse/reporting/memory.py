"""The memory plan in a report: what the peak is made of, what each block keeps, computes again or moves, and what that costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from fxfuse.memory.plan import BlockPlan, Choice, Kept, MemoryPlan, Point, size_text

LISTED = 6  # tensors of a point that are named one by one; the rest is one line


@dataclass(frozen=True)
class Group:
    """Blocks of one kind that have the same point."""

    blocks: tuple[BlockPlan, ...]

    @property
    def point(self) -> Point:
        return self.blocks[0].point

    @property
    def where(self) -> str:
        """Their paths in the model, runs of numbers written as ranges: ``model.layers.0-13,20``."""
        return places([block.module for block in self.blocks])

    @property
    def freed_bytes(self) -> int:
        """What one of these blocks would hold on the device beyond what it does, if nothing were recomputed or moved."""
        return sum(kept.bytes for kept in (*self.point.recomputed, *self.point.offloaded))


def groups(plan: MemoryPlan) -> list[Group]:
    """The blocks of a plan by kind and point, in the order in which they first run."""
    found: dict[tuple[str, Point], list[BlockPlan]] = {}
    for block in plan.blocks:
        found.setdefault((block.kind, block.point), []).append(block)
    return [Group(tuple(blocks)) for blocks in found.values()]


def places(paths: Sequence[str]) -> str:
    """Module paths in few words: the number that differs as ranges, or the paths one by one."""
    split = [path.split(".") for path in paths]
    if len({len(parts) for parts in split}) > 1:
        return ", ".join(paths)
    differing = [i for i, names in enumerate(zip(*split, strict=True)) if len(set(names)) > 1]
    if not differing:
        return paths[0]
    first, *others = differing
    numbers = [parts[first] for parts in split]
    if others or not all(number.isdecimal() for number in numbers):
        return ", ".join(paths)
    return ".".join([*split[0][:first], ranges(map(int, numbers)), *split[0][first + 1 :]])


def ranges(numbers: Iterable[int]) -> str:
    """0, 1, 2, 5 -> ``0-2,5``."""
    runs = [list(run) for _, run in groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])]
    return ",".join(f"{run[0][1]}-{run[-1][1]}" if len(run) > 1 else str(run[0][1]) for run in runs)


def headline(plan: MemoryPlan) -> str:
    """Budget, predicted peak, and where a step was measured, how far off the prediction was."""
    told = f"memory {size_text(plan.budget)} on {plan.device}: predicted peak {size_text(plan.predicted_peak)}"
    if plan.measured_peak is not None and plan.error is not None:
        told += f", measured {size_text(plan.measured_peak)} ({plan.error:+.1%})"
    if plan.margin:
        told += f", {size_text(plan.margin)} left free"
    return told


def parts_lines(plan: MemoryPlan) -> list[tuple[str, int, float]]:
    """What the peak is made of, largest first: (name, bytes, share)."""
    whole = max(sum(plan.parts.values()), 1)
    parts = sorted(plan.parts.items(), key=lambda part: -part[1])
    return [(name, size, size / whole) for name, size in parts if size]


def time_line(plan: MemoryPlan) -> str:
    """The step's predicted time, what of it the budget costs, and whose rates say so."""
    if not plan.step_ms:
        return ""
    waiting = f", {plan.waiting_ms:.0f} of those in wait for the link to the host" if plan.waiting_ms >= 0.5 else ""
    bought = f"{plan.extra_ms:.0f} ms of it for recomputation and copies{waiting}"
    return f"step {plan.step_ms:.0f} ms predicted, {bought}; rates: {plan.rates}"


def tensor_lines(point: Point) -> list[tuple[str, str, str]]:
    """(what becomes of it, tensor, bytes) of what a point decides about, largest first in each kind."""
    lines = []
    for fate, tensors in (("saved", point.saved), ("recomputed", point.recomputed), ("offloaded", point.offloaded)):
        merged = _merged(tensors)
        for what, count, size in merged[:LISTED]:
            lines.append((fate, f"{count} x {what}" if count > 1 else what, size_text(size)))
        rest = merged[LISTED:]
        if rest:
            lines.append((fate, f"{sum(count for _, count, _ in rest)} smaller", size_text(sum(size for *_, size in rest))))
    return lines


def _merged(tensors: Iterable[Kept]) -> list[tuple[str, int, int]]:
    """(what, how many, bytes together), largest first."""
    found: dict[str, tuple[int, int]] = {}
    for kept in tensors:
        count, size = found.get(kept.what, (0, 0))
        found[kept.what] = count + 1, size + kept.bytes
    return sorted(((what, *told) for what, told in found.items()), key=lambda line: -line[2])


def frontier_line(plan: MemoryPlan) -> str:
    """What other budgets would cost at these sizes."""
    told = ", ".join(f"{size_text(peak)} +{ms:.0f} ms" for peak, ms in sorted(plan.frontier))
    return f"frontier   {told}" if told else ""


# What one block of a group keeps, what it would keep beyond that if nothing were recomputed or moved, and what that costs.
COLUMNS = ("blocks", "point", "#number", "#saved, each", "#on the host", "#less, each", "#ms, each", "#tiles")


def rows(plan: MemoryPlan) -> list[tuple[str, ...]]:
    """One line a group of blocks, for the columns above."""
    return [
        (
            group.where,
            group.point.name,
            str(len(group.blocks)),
            size_text(group.point.saved_bytes),
            size_text(group.point.offloaded_bytes) if group.point.offloaded_bytes else "",
            size_text(group.freed_bytes) if group.freed_bytes else "",
            f"+{group.point.ms:.2f}",
            str(group.point.tiles) if group.point.tiles > 1 else "",
        )
        for group in groups(plan)
    ]


def section(plan: MemoryPlan) -> list[RenderableType]:
    """The plan as plain text for a terminal."""
    lines = [headline(plan)]
    lines += [f"  {size_text(size):>11}  {share:4.0%}  {name}" for name, size, share in parts_lines(plan)]
    lines += [line for line in (time_line(plan),) if line]
    parts: list[RenderableType] = [Text("\n".join(lines))]
    if plan.blocks:
        parts.append(_table(plan))
        for group in groups(plan):
            told = [f"  {fate:<11}{size:>11}  {what}" for fate, what, size in tensor_lines(group.point)]
            parts.append(Text("\n".join([f"{group.point.name}: each of {group.where}", *told])))
    parts += [Text(line) for line in (frontier_line(plan), *(f"note       {note}" for note in plan.notes)) if line]
    return [*parts, Text("")]


def _table(plan: MemoryPlan) -> Table:
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    lines = rows(plan)
    telling = [i for i in range(len(COLUMNS)) if any(line[i] for line in lines)]
    for i in telling:
        numeric = COLUMNS[i].startswith("#")
        grid.add_column(COLUMNS[i].removeprefix("#"), justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    for line in lines:
        grid.add_row(*(Text(line[i]) for i in telling))
    return grid


def load(data: dict[str, Any]) -> MemoryPlan:
    """The plan that ``dataclasses.asdict`` took apart."""
    def block(found: dict[str, Any]) -> BlockPlan:
        told: dict[str, Any] = dict(found["point"])
        choice = told["choice"]
        told["choice"] = Choice(tuple(choice["recompute"]), tuple(choice["offload"]), choice["tiles"], tuple(choice.get("keep", ())))
        for fate in ("saved", "recomputed", "offloaded"):
            told[fate] = tuple(Kept(**kept) for kept in told[fate])
        return BlockPlan(**{**found, "point": Point(**told)})

    frontier = [(peak, ms) for peak, ms in data["frontier"]]
    return MemoryPlan(**{**data, "blocks": [block(found) for found in data["blocks"]], "frontier": frontier})
