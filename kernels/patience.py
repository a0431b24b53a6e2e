"""How long a process waits, in all, for kernels that it could do without: candidates that are compiled to be timed.

A launch that is new needs one kernel; three more, timed beside it, make it a few percent faster at best. While dozens of kernels are
compiled for a first step, what is not there in time is left out of the choice, which then holds for this process and is not kept: the
next run finds all of them compiled. ``FXFUSE_TUNING_PATIENCE`` says how many seconds (2; "inf": however long it takes).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from fxfuse.kernels import ahead, workers

SECONDS = 2.0
C = TypeVar("C")
R = TypeVar("R")

_spent = [0.0]


def left() -> float:
    """Seconds that may still be waited."""
    return max(0.0, float(os.environ.get("FXFUSE_TUNING_PATIENCE", SECONDS)) - _spent[0])


def in_time(configs: Sequence[C], ready: Callable[[C], R | None], device: torch.device, needed: int = 1) -> tuple[dict[C, R], bool]:
    """What ``ready`` makes of each configuration (it compiles and loads a launch; None: it does not fit), and whether all were there in
    time. However long the first ``needed`` ones take, they are waited for."""
    if not workers.enabled():
        return _side_by_side(configs, ready), True
    under_way = {config: _handed_out(config, ready, device) for config in configs}
    made = {config: ready(config) for config in configs[:needed]}
    start = time.perf_counter()
    wait([future for futures in under_way.values() for future in futures], min(left(), threading.TIMEOUT_MAX))
    _spent[0] += time.perf_counter() - start
    there = [config for config in configs[needed:] if all(future.done() for future in under_way[config])]
    made |= {config: ready(config) for config in there}
    return {config: launch for config, launch in made.items() if launch is not None}, len(made) == len(configs)


def _handed_out(config: C, ready: Callable[[C], R | None], device: torch.device) -> list[Future[None]]:
    with ahead.announcing(device) as futures, workers.at_leisure():
        ready(config)
    return futures


def _side_by_side(configs: Sequence[C], ready: Callable[[C], R | None]) -> dict[C, R]:
    """Compiled in this process: most of it is native code, outside Python's lock."""
    with ThreadPoolExecutor(len(configs), thread_name_prefix="fxfuse-compile") as pool:
        launches = dict(zip(configs, pool.map(ready, configs), strict=True))
    return {config: launch for config, launch in launches.items() if launch is not None}
