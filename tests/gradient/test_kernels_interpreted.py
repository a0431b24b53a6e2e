"""Emitted kernels in Triton's interpreter: each file of tests/gradient/interpreted in a process where Triton interprets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import triton
from packaging.version import Version

FOLDER = Path(__file__).parent / "interpreted"


# Triton 3.6 interprets a loop's bounds as arrays of one element, which numpy takes for numbers up to 2.3 only.
RUNS_LOOPS = Version(triton.__version__) >= Version("3.7") or Version(numpy.__version__) < Version("2.4")


@pytest.mark.skipif(not RUNS_LOOPS, reason=f"Triton {triton.__version__} cannot interpret loops with numpy {numpy.__version__}")
@pytest.mark.parametrize("file", sorted(FOLDER.glob("test_*.py")), ids=lambda path: path.stem)
def test_in_the_interpreter(file: Path, tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "FXFUSE_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", str(file)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=FOLDER.parent.parent.parent)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
