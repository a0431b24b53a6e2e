"""Where time goes, from samples of the stacks: a tree of functions with the seconds spent below each.

A profiler counts every call and thereby doubles what Python takes; samples every few milliseconds cost next to nothing, see native
code too (by the Python line that called it), and both threads of a training step: a backward of its own thread is counted, the
thread that waits for it is not.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from types import CodeType, FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Self

INTERVAL = 0.004
WAITING = ("_engine_run_backward",)  # the innermost function of a thread that waits for another one's work
NOT_OURS = ("fxfuse-", "stack-samples")  # threads that work beside the step


@dataclass
class Place:
    """A function below its caller: seconds in it and in what it calls."""

    seconds: float = 0.0
    below: dict[str, Place] = field(default_factory=dict)

    def lines(self, least: float, depth: int = 0) -> Iterator[str]:
        """Functions that took ``least`` seconds; one that only calls another one is left out."""
        for name, place in sorted(self.below.items(), key=lambda item: -item[1].seconds):
            if place.seconds < least:
                continue
            only = max((p.seconds for p in place.below.values()), default=0.0)
            shown = only < 0.97 * place.seconds
            if shown:
                yield f"{place.seconds:7.2f} s  {'  ' * depth}{name}"
            yield from place.lines(least, depth + shown)


@cache
def described(code: CodeType) -> str:
    return f"{getattr(code, 'co_qualname', code.co_name)} ({'/'.join(code.co_filename.rsplit('/', 2)[-2:])})"


class Samples:
    """Of the threads that run the step, while it is entered."""

    def __init__(self) -> None:
        self.tree = Place()
        self.own: dict[str, float] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._take, name="stack-samples", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._end.set()
        self._thread.join()

    def _take(self) -> None:
        last = time.perf_counter()
        while not self._end.wait(INTERVAL):
            now = time.perf_counter()
            names = {thread.ident: thread.name for thread in threading.enumerate()}
            for ident, frame in sys._current_frames().items():
                inner = frame.f_code.co_name
                idle = inner == "wait" and ident != threading.main_thread().ident
                if not (names.get(ident, "").startswith(NOT_OURS) or inner in WAITING or idle):
                    self._count(frame, now - last)
            last = now

    def _count(self, frame: FrameType | None, seconds: float) -> None:
        names: list[str] = []
        while frame is not None:
            names.append(described(frame.f_code))
            frame = frame.f_back
        self.own[names[0]] = self.own.get(names[0], 0.0) + seconds
        place = self.tree
        for name in reversed(names):
            place = place.below.setdefault(name, Place())
            place.seconds += seconds

    def text(self, least: float = 0.1) -> str:
        """The tree, and the functions in which most samples were taken themselves."""
        own = sorted(self.own.items(), key=lambda item: -item[1])[:25]
        return "\n".join([*self.tree.lines(least), "in itself:", *(f"{seconds:7.2f} s  {name}" for name, seconds in own)]) + "\n"
