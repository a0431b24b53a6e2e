"""The garbage collector around a compilation: nothing in it, everything after it, and the user's own settings stay."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from fxfuse.capture.collector import collected_once


class Ring:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    gc.enable()
    gc.unfreeze()


def collections() -> list[Any]:
    seen: list[Any] = []
    gc.callbacks.append(lambda phase, info: seen.append(info["generation"]) if phase == "start" else None)
    return seen


def test_garbage_of_a_compilation_is_gone_after_it_and_not_in_it() -> None:
    seen = collections()
    with collected_once():
        ring = weakref.ref(Ring())
        kept = [[[]] for _ in range(100_000)]
        assert seen == []
        assert ring() is not None
    gc.callbacks.pop()
    assert seen == [2]
    assert ring() is None
    assert len(kept) == 100_000
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_older_garbage_is_found_by_the_next_collection() -> None:
    ring = weakref.ref(Ring())
    with collected_once():
        pass
    gc.collect()
    assert ring() is None


def test_an_exception_leaves_nothing_set_aside() -> None:
    with pytest.raises(ValueError, match="made up"), collected_once():
        raise ValueError("made up")
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_what_the_user_has_set_stays() -> None:
    gc.freeze()
    before = gc.get_freeze_count()
    with collected_once():
        assert not gc.isenabled()
    assert gc.get_freeze_count() == before
    gc.unfreeze()
    gc.disable()
    seen = collections()
    with collected_once():
        pass
    gc.callbacks.pop()
    assert not gc.isenabled()
    assert seen == []
