"""Python's garbage collector, while a graph is compiled."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

# Objects that an interpreter sets aside itself as it starts (Python 3.12: 375); a program that does so sets aside all it has.
_OF_THE_INTERPRETER = 2000


@contextmanager
def collector_paused() -> Iterator[None]:
    """No collection in here."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def collected_once(wanted: bool = True) -> Iterator[None]:
    """No collection in here; what was made in here is looked through at the end.

    Compiling makes hundreds of thousands of objects that stay: to look through them all, time and again, takes a tenth of a first step.
    Those that were there before (the libraries, the model) are set aside meanwhile, so that the collection at the end does not go
    through them; they are of the oldest generation afterwards. Not where somebody else has set objects aside, or collects nothing.
    """
    if not wanted or not gc.isenabled():
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
