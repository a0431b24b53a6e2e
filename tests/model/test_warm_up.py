"""What is begun ahead of the first step: done in a thread, and what fails there fails nowhere else."""

from __future__ import annotations

import sys

import pytest
import torch
import triton

from fxfuse.kernels import warm_up


def test_triton_is_hashed_once() -> None:
    warm_up.begin(torch.device("cpu")).join()
    before = triton.runtime.cache.triton_key.cache_info()
    triton.runtime.cache.triton_key()
    after = triton.runtime.cache.triton_key.cache_info()
    assert (before.currsize, after.hits, after.misses) == (1, before.hits + 1, before.misses)


def test_modules_that_are_imported_late_are_there() -> None:
    warm_up.begin(torch.device("cpu")).join()
    assert set(warm_up.LATE_IMPORTS) <= set(sys.modules)


def test_what_fails_is_left_to_who_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise OSError("no such library")

    monkeypatch.setattr(triton.runtime.cache, "triton_key", broken)
    warm_up.begin(torch.device("cpu")).join()
