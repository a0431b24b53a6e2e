"""``cuda_graphs="auto"``: whether the blocks of a graph wait for the host, from the time of one of their calls.

Between the moment when the device comes to a call's first kernel and the moment when it has done the last, it is busy, or it waits for
launches. That time is never shorter than the host's where the host is what is waited for, and much longer where it is not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from .capture import Capture

TIMED = 4  # the call that is timed: the first ones compile, look up, and write launchers
HOST_BOUND = 0.8  # the host's share of the device's time from which on the host is what is waited for


class Gauge:
    """Times one call of a graph."""

    def __init__(self) -> None:
        self._calls = 0
        self._host = 0.0
        self._device: Callable[[], float | None] | None = None
        self.worth: bool | None = None
        self.why_not = ""

    def ask(self) -> bool | None:
        """Is it worth while to record; None while that is not known."""
        if self.worth is None and self._device is not None:
            device = self._device()
            if device is not None:
                self.worth = self._host >= HOST_BOUND * device
                self.why_not = (f"the host is not what a step waits for: {1e3 * self._host:.2f} ms to launch a block's forward, "
                                f"{1e3 * device:.2f} ms to run it")
        return self.worth

    def run(self, run: Callable[[list], Any], arguments: list, capture: Capture) -> Any:
        """The outputs of a call, which is timed if it is the one."""
        self._calls += 1
        if self._calls != TIMED:
            return run(arguments)
        begun = time.perf_counter()
        stop = capture.watch()
        outputs = run(arguments)
        self._device = stop()
        self._host = time.perf_counter() - begun
        return outputs
