"""A fused Llama of 1.2 billion parameters trains 200 steps on the loss curve of its eager twin, within eager's noise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_fused_twin_has_the_loss_curve_of_eager(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "twins.py"), "--out", str(tmp_path / "twins.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
