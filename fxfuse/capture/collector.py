"""Python's garbage collector, while a graph is compiled and while a training forward runs.

A forward leaves thousands of objects that live until its backward (of each tensor that a checkpoint will compute again, three).
Collections that come meanwhile find none of them dead and count them as old; where a quarter of all objects seem new, everything is
gone through. With the libraries that a trainer loads that is half a million objects: 0.3 to 0.4 s in one step of some 40, in which the
device runs dry (results/steadiness.jsonl). Looked through once, when a forward has ended, far fewer are counted.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_ours: ContextVar[bool] = ContextVar("pause_of_ours", default=False)  # that nothing is collected now is no wish of the user's
# Objects that an interpreter sets aside itself as it starts (Python 3.12: 375); a program that does so sets aside all it has.
_OF_THE_INTERPRETER = 2000


@contextmanager
def collector_paused(wanted: bool = True) -> Iterator[None]:
    """No collection in here but those that somebody asks for."""
    if not wanted or not gc.isenabled():
        yield
        return
    gc.disable()
    token = _ours.set(True)
    try:
        yield
    finally:
        _ours.reset(token)
        gc.enable()


@contextmanager
def collected_once(wanted: bool = True) -> Iterator[None]:
    """No collection in here; what was made in here is looked through at the end.

    Compiling makes hundreds of thousands of objects that stay: to look through them all, time and again, takes a tenth of a first step.
    Those that were there before (the libraries, the model) are set aside meanwhile, so that the collection at the end does not go
    through them; they are of the oldest generation afterwards. Not where somebody else has set objects aside, or collects nothing.
    """
    if not wanted or not (gc.isenabled() or _ours.get()):
        yield
        return
    aside = gc.get_freeze_count() < _OF_THE_INTERPRETER
    if aside:
        gc.freeze()
    try:
        with collector_paused():
            yield
            if aside:
                gc.collect()
    finally:
        if aside:
            gc.unfreeze()
