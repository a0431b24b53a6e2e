"""Kernels with a fault in them, for tests that have to see it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def with_fault(module: ModuleType, before: str, after: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A copy of ``module``, written in ``folder``, in whose text ``after`` stands where ``before`` stood, once."""
    text = Path(str(module.__file__)).read_text()
    assert text.count(before) == 1
    name = f"faulty_{module.__name__.rpartition('.')[2]}"
    path = folder / f"{name}.py"
    path.write_text(text.replace(before, after))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    faulty = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, faulty)  # Triton looks a kernel's module up
    spec.loader.exec_module(faulty)
    return faulty
