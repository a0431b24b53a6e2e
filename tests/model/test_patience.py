"""Candidates are waited for up to a limit for the whole process; the first is waited for however long it takes."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future

import pytest
import torch

from fxfuse.kernels import ahead, patience, workers

DEVICE = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_spent", [0.0])
    monkeypatch.setattr(workers, "enabled", lambda: True)


class Compiler:
    """``ready`` of a launch whose kernels are compiled when they are told to be; what it was asked for, in order."""

    def __init__(self, done: set[str]) -> None:
        self.futures: dict[str, Future[None]] = {}
        self.loaded: list[str] = []
        self.done = done

    def __call__(self, config: str) -> str | None:
        future = self.futures.setdefault(config, Future())
        if ahead.announced_on() is not None:
            if config in self.done and not future.done():
                future.set_result(None)
            ahead.announce(future)
            return None
        if not future.done():
            future.set_result(None)  # (its launch waits for it)
        self.loaded.append(config)
        return None if config == "too large" else f"launch of {config}"


def test_what_is_late_is_left_out_and_the_choice_is_not_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXFUSE_TUNING_PATIENCE", "0.05")
    compiler = Compiler({"b"})
    made, complete = patience.in_time(["a", "b", "c"], compiler, DEVICE)
    assert made == {"a": "launch of a", "b": "launch of b"}
    assert not complete
    assert compiler.loaded == ["a", "b"]
    assert patience.left() < 0.01
    begin = time.perf_counter()
    assert patience.in_time(["a", "c"], Compiler(set()), DEVICE, needed=0) == ({}, False)
    assert time.perf_counter() - begin < 0.04  # all of it has been spent


def test_all_are_waited_for_where_time_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXFUSE_TUNING_PATIENCE", "inf")
    compiler = Compiler({"b", "too large"})
    late = compiler.futures["c"] = Future()
    threading.Timer(0.05, late.set_result, [None]).start()
    made, complete = patience.in_time(["a", "b", "too large", "c"], compiler, DEVICE)
    assert (set(made), complete) == ({"a", "b", "c"}, True)


def test_without_processes_all_are_compiled_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXFUSE_TUNING_PATIENCE", "0")
    monkeypatch.setattr(workers, "enabled", lambda: False)
    assert patience.in_time(["a", "b"], Compiler(set()), DEVICE) == ({"a": "launch of a", "b": "launch of b"}, True)
