"""Compiling before the first launch: kernels that are announced, and rehearsals.

In a rehearsal launches that are new are not run, their kernels begin to be compiled.

What is to be run for the first time, one launch after the other, is rehearsed first: then all its kernels are compiled side by side,
in other processes (workers.py), and the run itself waits for each but a moment. Outputs of a rehearsed launch hold nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

import torch

from fxfuse.kernels import workers

_rehearsals: list[None] = []
_announced = threading.local()


def announced_on() -> torch.device | None:
    """The device for which this thread's loads are announcements."""
    return getattr(_announced, "device", None)


@contextmanager
def announcing(device: torch.device) -> Iterator[list[Future[None]]]:
    """What is loaded by this thread in here is compiled elsewhere for the device, and not loaded. Gives what is under way then."""
    _announced.device, _announced.futures = device, []
    try:
        yield _announced.futures
    finally:
        _announced.device = None


def announce(future: Future[None] | None) -> None:
    """A kernel has been handed out; None: it is compiled, or nobody compiles it."""
    if announced_on() is not None and future is not None:
        _announced.futures.append(future)


def rehearsing() -> bool:
    return bool(_rehearsals)


@contextmanager
def rehearsal() -> Iterator[bool]:
    """Launches of any thread (a backward runs in one of its own) are rehearsed in here. Gives False where there is nothing to gain."""
    if not workers.enabled():
        yield False
        return
    _rehearsals.append(None)
    try:
        yield True
    finally:
        _rehearsals.pop()
