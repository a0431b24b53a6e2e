"""benchmarks/distributed.py, benchmarks/convergence.py: what they conclude from numbers, and that the first runs."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import convergence, device_tables
from benchmarks.rows import read

ROOT = Path(__file__).resolve().parents[2]


def curve(seed: int, noise: float = 0.02, shift: float = 0.0, from_step: int = 0) -> list[float]:
    drawn = random.Random(seed)
    return [3.0 - step / 300 + drawn.gauss(0, noise) + (shift if step >= from_step else 0.0) for step in range(300)]


EAGER = {seed: curve(seed) for seed in range(3)}


def test_the_same_curve_is_the_same() -> None:
    verdict = convergence.judged(EAGER, {0: curve(0), 1: [loss + 1e-4 for loss in curve(1)]})
    assert convergence.faults(verdict) == []
    assert verdict[0]["paired"] == 0


@pytest.mark.parametrize(("changes", "named"), [
    (dict(shift=0.02), "end"),
    (dict(shift=0.02, from_step=280), "windows"),
    (dict(shift=0.008), "paired"),
])  # fmt: skip
def test_a_worse_curve_is_told_apart(changes: dict[str, float], named: str) -> None:
    assert any(f"seed 0: {named} is" in fault for fault in convergence.faults(convergence.judged(EAGER, {0: curve(0, **changes)})))


def test_a_curve_that_is_no_number_fails() -> None:
    assert convergence.faults(convergence.judged(EAGER, {0: [*curve(0)[:299], float("nan")]}))


def test_questions_are_not_learnt() -> None:
    text = 'def f(a, b):\n    """Return what a and b are together."""\n    return a + b\n\ndef g(): pass\n'
    pairs = list(convergence.documented(text))
    assert pairs == [("def f(a, b):", "Return what a and b are together.")]
    assert list(convergence.documented("def {{ name }}: no python")) == []


def rows_of(mode: str = "lora") -> list[dict[str, object]]:
    made = []
    for placed, devices, slow in (("one", 1, 1.0), ("ddp", 2, 1.02), ("fsdp2", 2, 1.1)):
        for contender, ms in (("hf", 1000.0), ("fxfuse", 600.0)):
            norms = [1.0, 1.01 if contender == "fxfuse" else 1.0]
            made.append(dict(mode=mode, placed=placed, contender=contender, ms=ms * slow, tokens_s=devices * 8192e3 / (ms * slow),
                             peak_gib=40.0, whole=True, losses=[12.0, 11.5], grad_norms=norms, run="r", workload="w", gpu="g",
                             versions={}, commit="c"))  # fmt: skip
    return made


def test_the_table_of_devices(tmp_path: Path) -> None:
    assert device_tables.distributed(tmp_path).startswith("Not measured")
    (tmp_path / "distributed.jsonl").write_text("\n".join(map(json.dumps, rows_of())) + "\n")
    lines = device_tables.distributed(tmp_path).splitlines()
    assert lines[2] == "| lora | 1 GPU | unfused | 1000 | 8,192 | 40.0 |  |  |  |"
    assert lines[5] == "| lora | 2, DDP | fused | 612 | 26,771 | 40.0 | 1.96x | 1.67x | 0.0e+00, 1.0% |"


@pytest.mark.slow
def test_a_run_on_two_processes(tmp_path: Path) -> None:
    out = tmp_path / "distributed.jsonl"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "benchmarks/distributed.py"]
    command += ["--cpu", "--tiny", "--layers", "1", "--batch", "1", "--warmup", "2", "--steps", "1", "--modes", "qlora"]
    environment = dict(os.environ, RUN="test", COMMIT="test")
    subprocess.run([*command, "--out", str(out)], cwd=ROOT, env=environment, check=True, timeout=300, capture_output=True)
    found = {(row["placed"], row["contender"]): row for row in read(out)}
    assert len(found) == 6
    for (placed, contender), row in found.items():
        assert row["devices"] == (1 if placed == "one" else 2)
        assert row["losses"] == pytest.approx(found[placed, "hf"]["losses"], rel=1e-3)
        assert row["grad_norms"] == pytest.approx(found[placed, "hf"]["grad_norms"], rel=3e-2)
        if contender == "fxfuse":
            assert row["ranks_agree"]
            assert not row["report_errors"]
            assert (row["fused"]["nf4_linear"], row["fused"]["rope"]) == (7, 2)
