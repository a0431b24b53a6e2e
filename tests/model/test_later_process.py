"""A later process takes the joint graphs of an earlier one, and does the same to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def in_a_process(folder: Path, *arguments: str, **environment: str) -> dict:
    """What tests/model/two_steps.py printed."""
    surroundings = os.environ | {"FXFUSE_CACHE_DIR": str(folder), "FXFUSE_REMEMBER": "1"} | environment
    done = subprocess.run([sys.executable, "-m", "tests.model.two_steps", *arguments], env=surroundings, cwd=ROOT, check=True,
                          capture_output=True, text=True, timeout=120)
    return json.loads(done.stdout.splitlines()[-1])


def test_a_later_process_does_the_same_without_tracing(tmp_path: Path) -> None:
    budget = "200000"
    first, second = in_a_process(tmp_path, budget), in_a_process(tmp_path, budget)
    traces = [run.pop("traces") for run in (first, second)]
    assert traces[0]["kept"] >= 3
    assert "left" not in traces[0]
    assert traces[1] == {"taken": traces[0]["kept"] + traces[0].get("taken", 0)}
    assert first["report"]["memory"]
    assert second == first  # losses, gradients, the code of all graphs, the report with its plan
