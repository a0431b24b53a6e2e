"""What is alive at the peak of one training step: allocations of the caching allocator, grouped by the line that made them.

The allocator's own history (torch.cuda.memory._record_memory_history) gives every allocation and release with the Python
stack; replaying it finds the peak and what was alive there. What was allocated before the step (weights, optimizer state) is
one figure.
"""

from __future__ import annotations

import linecache
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

MIB = 2**20
# Frames that say nothing of who wanted the memory.
_PLUMBING = ("torch/", "contextlib.py", "threading.py")


@dataclass(frozen=True)
class Allocation:
    """One live buffer: its bytes, when it was made (index of the event), and the lines that made it, innermost first."""

    nbytes: int
    made: int
    lines: tuple[str, ...]


def of(step: Callable[[], Any], frames: int = 3) -> str:
    """Runs `step` once on the current device and says what its peak is made of."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.memory._record_memory_history(max_entries=1_000_000, stacks="python")
    try:
        step()
        torch.cuda.synchronize()
        events = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    return text(events, before, torch.cuda.max_memory_allocated(), frames)


def text(events: list[dict[str, Any]], before: int, peak: int, frames: int = 3) -> str:
    """The peak of a history, and the level of memory over its course."""
    at, height, levels = _peak(events)
    groups: dict[tuple[int, tuple[str, ...]], list[Allocation]] = defaultdict(list)
    for allocation in _alive(events, at, frames):
        groups[allocation.nbytes, allocation.lines].append(allocation)
    ranked = sorted(groups.items(), key=lambda item: -item[0][0] * len(item[1]))
    lines = [
        f"before the step {before / MIB:.1f} MiB, peak {peak / MIB:.1f} MiB measured, {(before + height) / MIB:.1f} replayed, "
        f"at event {at} of {len(events)}",
        *(
            f"{nbytes * len(found) / MIB:9.1f} MiB {len(found):4d} x {nbytes / MIB:8.2f}  events {found[0].made}..{found[-1].made}  "
            + "  <-  ".join(where)
            for (nbytes, where), found in ranked[:60]
        ),
        f"{sum(nbytes * len(found) for (nbytes, _), found in ranked[60:]) / MIB:9.1f} MiB in {max(0, len(ranked) - 60)} more groups",
        "level over the step, MiB above its start, 64 parts (highest in each): "
        + " ".join(f"{level / MIB:.0f}" for level in levels),
    ]
    return "\n".join(lines)


def _peak(events: list[dict[str, Any]], parts: int = 64) -> tuple[int, int, list[int]]:
    """Index of the event with the highest level, its height in bytes above the start, and the highest level of each part."""
    level = height = at = 0
    levels = [0] * parts
    for index, event in enumerate(events):
        level += {"alloc": 1, "free_completed": -1}.get(event["action"], 0) * event["size"]
        part = index * parts // len(events)
        levels[part] = max(levels[part], level)
        if level > height:
            height, at = level, index
    return at, height, levels


def _alive(events: list[dict[str, Any]], at: int, frames: int) -> list[Allocation]:
    alive: dict[int, Allocation] = {}
    for index, event in enumerate(events[: at + 1]):
        if event["action"] == "alloc":
            alive[event["addr"]] = Allocation(event["size"], index, _lines(event.get("frames", ()), frames))
        elif event["action"] == "free_completed":
            alive.pop(event["addr"], None)
    return list(alive.values())


def _lines(stack: Any, frames: int) -> tuple[str, ...]:
    """The innermost frames outside torch; of a generated graph its line of code."""
    found = []
    for frame in stack:
        name = frame["filename"]
        if any(part in name for part in _PLUMBING):
            continue
        source = linecache.getline(name, frame["line"]).strip()[:110]
        found.append(f"{name.rsplit('/', 1)[-1]}:{frame['line']} {source}")
        if len(found) == frames:
            break
    return tuple(found)
