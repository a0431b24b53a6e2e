"""A pool of threads that takes up its tasks by urgency: what is waited for before what will be needed, and that before what may be.

``concurrent.futures`` takes them in the order in which they came. There a launch that waits for its one kernel waits for every
candidate that was handed in before it.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

NOW, SOON, PERHAPS = 0, 1, 2
_NEVER = 3  # behind all tasks: the end
Task = tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]


class UrgentFirst:
    """Threads live as long as the pool, and do not keep the process from ending."""

    def __init__(self, threads: int, name: str) -> None:
        self._waiting: queue.PriorityQueue[tuple[int, int, Task | None]] = queue.PriorityQueue()
        self._numbers = itertools.count()  # among equally urgent ones the first comes first
        self._open: dict[Future[Any], Task] = {}  # not taken up
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._work, name=f"{name}-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[..., Any], *arguments: Any, urgency: int = SOON) -> Future[Any]:
        task: Task = (Future(), function, arguments)
        with self._lock:
            self._open[task[0]] = task
        self._waiting.put((urgency, next(self._numbers), task))
        return task[0]

    def hurry(self, future: Future[Any]) -> None:
        """Somebody waits for it."""
        with self._lock:
            task = self._open.get(future)
        if task is not None:
            self._waiting.put((NOW, next(self._numbers), task))  # a second time; whoever comes late finds it taken up

    def shutdown(self) -> None:
        """Returns when all tasks are done."""
        for _ in self._threads:
            self._waiting.put((_NEVER, next(self._numbers), None))
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while True:
            task = self._waiting.get()[2]
            if task is None:
                return
            future, function, arguments = task
            with self._lock:
                if self._open.pop(future, None) is None:
                    continue
            try:
                future.set_result(function(*arguments))
            except BaseException as error:  # whoever asks for the result meets it
                future.set_exception(error)
