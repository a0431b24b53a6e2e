"""What every test gets: one thread, a fixed seed, uninitialised memory that shows, and a fresh Dynamo."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("FXFUSE_REMEMBER", "0")  # what is tested is found out, not remembered
os.environ.setdefault("FXFUSE_TUNING_PATIENCE", "inf")  # every candidate is tried

import hypothesis
import pytest
import torch

GPU_TESTS = Path(__file__).parent / "gpu"

# The same examples every time, a few of them; `make test-all` draws many, and new ones each time.
hypothesis.settings.register_profile("quick", max_examples=25, deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("deep", max_examples=400, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in tests/gpu is marked gpu; without a GPU what is so marked is skipped, and says so."""
    without = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if GPU_TESTS in item.path.parents:
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(without)


@pytest.fixture(autouse=True)
def same_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    """``torch.empty`` and its kin give NaN (integers: their maximum), so that an unwritten output is seen.

    torch does this itself in its deterministic mode, below Python, in compiled graphs too.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[assignment]
    yield
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """No test sees the graphs of another."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture(autouse=True, scope="module")
def forgotten_sizes() -> Iterator[None]:
    """A compilation's symbolic sizes stay for good: the tensors that they were made for hold them, below Python, and are held by them.
    With what torch remembers of operations on them, to look through all objects took twenty seconds after two thousand tests."""
    yield
    if "torch.fx.experimental.symbolic_shapes" in sys.modules:
        kind = sys.modules["torch.fx.experimental.symbolic_shapes"].ShapeEnv
        for sizes in [known for known in gc.get_objects() if type(known) is kind]:
            (sizes.tracked_fakes or []).clear()
            sizes.fake_tensor_cache.clear()


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is compiled from here on: the GraphRecord of each graph."""
    from fxfuse import backend  # most tests need none of it

    made: list[Any] = []
    original = backend.new_record

    def keep() -> Any:
        made.append(original())
        return made[-1]

    monkeypatch.setattr(backend, "new_record", keep)
    return made
