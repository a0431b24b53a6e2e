"""What is begun ahead of the first step: done in a thread, and what fails there fails nowhere else."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch
import triton
from torch import nn

import fxfuse
from fxfuse import api, lowering
from fxfuse.kernels import warm_up, workers


def test_triton_is_hashed_once() -> None:
    warm_up.begin(torch.device("cpu")).join()
    before = triton.runtime.cache.triton_key.cache_info()
    triton.runtime.cache.triton_key()
    after = triton.runtime.cache.triton_key.cache_info()
    assert (before.currsize, after.hits, after.misses) == (1, before.hits + 1, before.misses)


def test_modules_that_are_imported_late_are_there() -> None:
    warm_up.begin(torch.device("cpu")).join()
    assert set(warm_up.LATE_IMPORTS) <= set(sys.modules)


def test_threads_take_turns_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    before, during = sys.getswitchinterval(), []
    monkeypatch.setattr(warm_up, "hash_triton", lambda: during.append(sys.getswitchinterval()))
    warm_up.begin(torch.device("cpu"))
    warm_up.hashed()
    assert during == [pytest.approx(warm_up.SHORT)]
    assert sys.getswitchinterval() == before


def test_who_needs_the_hash_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[float] = []
    monkeypatch.setattr(warm_up, "hash_triton", lambda: (time.sleep(0.2), made.append(time.perf_counter())))
    warm_up.begin(torch.device("cpu"))
    warm_up.hashed()
    assert made
    warm_up.hashed()


def test_what_fails_is_left_to_who_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise OSError("no such library")

    monkeypatch.setattr(triton.runtime.cache, "triton_key", broken)
    warm_up.begin(torch.device("cpu")).join()


def test_processes_start_for_models_that_no_earlier_run_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FXFUSE_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("FXFUSE_REMEMBER", raising=False)
    started: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(warm_up, "begin", lambda device: None)
    monkeypatch.setattr(workers, "enabled", lambda: True)
    monkeypatch.setattr(workers, "start", lambda: started.append(1))

    def after(width: int, how: str) -> int:
        lowering.start_compilers(nn.Sequential(nn.Linear(width, 8), nn.Linear(width, 8)), how)
        return len(started)

    assert [after(8, "a"), after(8, "a"), after(16, "a"), after(16, "b"), after(16, "b"), after(8, "a")] == [1, 1, 2, 3, 3, 3]
    monkeypatch.setenv("FXFUSE_REMEMBER", "0")
    assert after(8, "a") == 4


def test_optimize_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """(A model that says that it is on a GPU.)"""
    monkeypatch.setattr(warm_up, "LATE_IMPORTS", ())
    monkeypatch.setattr(warm_up, "hash_triton", lambda: time.sleep(0.3))
    monkeypatch.setattr(api, "start_compilers", lambda model, how: warm_up.begin(torch.device("cpu")))
    model = nn.Sequential(nn.Linear(4, 4))
    warm_up.hashed()
    fxfuse.optimize(model)
    assert warm_up._hashing == []
    fxfuse.restore(model)
    monkeypatch.setattr(nn.Parameter, "is_cuda", True, raising=False)
    fxfuse.optimize(model)
    assert not any(thread.is_alive() for thread in warm_up._hashing)
    assert warm_up._hashing
    warm_up.hashed()
