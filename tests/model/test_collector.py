"""The garbage collector around compilations and training forwards: nothing in them, everything after them, the user's settings stay."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fxfuse
from fxfuse.capture.collector import collected_once, collector_paused
from tests.model.builders import llama, tokens


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
    aside = Ring()
    gc.freeze()
    with collected_once():
        assert not gc.isenabled()
    assert all(each is not aside for each in gc.get_objects())  # (others of them may have died meanwhile)
    gc.unfreeze()
    gc.disable()
    seen = collections()
    with collected_once():
        pass
    gc.callbacks.pop()
    assert not gc.isenabled()
    assert seen == []


def test_a_compilation_in_a_pause_of_ours_is_collected_all_the_same() -> None:
    with collector_paused():
        with collected_once():
            ring = weakref.ref(Ring())
        assert ring() is None
        assert not gc.isenabled()
    assert gc.isenabled()


@pytest.fixture
def trained() -> Any:
    """A model that has compiled; what its forward finds the collector to be is in its ``enabled``."""
    model = fxfuse.optimize(llama(2))
    model(**tokens(batch=2, length=16)).loss.backward()
    model.enabled = []
    model.model.norm.register_forward_pre_hook(lambda *_: model.enabled.append(gc.isenabled()))
    return model


def test_nothing_is_collected_in_a_training_forward(trained: Any) -> None:
    """What it leaves for the backward would be counted as old, until everything is gone through."""
    gc.collect()
    seen = collections()
    out = trained(**tokens(batch=2, length=16))
    gc.callbacks.pop()
    assert trained.enabled == [False]
    assert 1 not in seen
    assert gc.isenabled()
    out.loss.backward()


def test_a_forward_without_gradients_leaves_the_collector_alone(trained: Any) -> None:
    with torch.no_grad():
        trained(**tokens(batch=2, length=16))
    assert trained.enabled == [True]


def test_the_collector_works_again_after_a_forward_that_failed(trained: Any) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("made up")

    trained.model.norm.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="made up"):
        trained(**tokens(batch=2, length=16))
    assert gc.isenabled()


def test_a_user_who_collects_nothing_is_not_overruled(trained: Any) -> None:
    gc.disable()
    trained(**tokens(batch=2, length=16)).loss.backward()
    assert not gc.isenabled()
