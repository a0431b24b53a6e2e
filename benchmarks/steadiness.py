"""How even the steps of a longer run are: each step's time, what the host took of it, and the garbage collections in it.

    python benchmarks/steadiness.py --workload W2 --contender fxfuse --steps 70
    python benchmarks/steadiness.py --workload W2 --contender unsloth --steps 70

A median over a few steps (steps.py) does not show what happens once in thirty. One process trains one contender; after each step
the device is waited for. A row in results/steadiness.jsonl has all steps from ``--skip`` on: mean, median, slowest, and of each
collection that took 2 ms or more its step, generation and milliseconds.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    importlib.import_module("benchmarks")
    del sys.path[0]  # its folder `kernels` would pass for the package of that name, which bitsandbytes tries
    if importlib.util.find_spec("fxfuse") is None:
        sys.path.insert(0, str(ROOT))
    if "unsloth" in sys.argv:
        importlib.import_module("unsloth")  # before torch: it sets torch's environment

import torch  # noqa: E402

from benchmarks import peers, rows  # noqa: E402
from benchmarks.jobs import Contender  # noqa: E402
from benchmarks.training_steps import Training  # noqa: E402
from benchmarks.workloads import named  # noqa: E402

LEAST_MS = 2.0


class Collections:
    """What Python's collector did, step by step."""

    def __init__(self) -> None:
        self.step, self.begun = 0, 0.0
        self.found: list[tuple[int, int, float]] = []
        gc.callbacks.append(self)

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self.begun = time.perf_counter()
            return
        ms = (time.perf_counter() - self.begun) * 1e3
        if ms >= LEAST_MS:
            self.found.append((self.step, info["generation"], round(ms, 1)))


def steps_of(training: Training, count: int, collections: Collections) -> list[tuple[float, float]]:
    """(milliseconds, of these until the host had queued everything) of each step."""
    found = []
    for index in range(count):
        collections.step = index
        start = time.perf_counter()
        training.step(index)
        queued = time.perf_counter()
        if training.device == "cuda":
            torch.cuda.synchronize()
        found.append(((time.perf_counter() - start) * 1e3, (queued - start) * 1e3))
    return found


def summary(
    steps: list[tuple[float, float]], collections: list[tuple[int, int, float]], skip: int
) -> dict[str, Any]:
    """A row's numbers: without the first ``skip`` steps."""
    ms = [each for each, _ in steps[skip:]]
    return dict(
        steps=len(ms),
        ms_mean=round(statistics.mean(ms), 2),
        ms=round(statistics.median(ms), 2),
        ms_max=round(max(ms), 2),
        host_ms=round(statistics.median(host for _, host in steps[skip:]), 2),
        ms_steps=[round(each, 1) for each in ms],
        collections=[each for each in collections if each[0] >= skip],
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", default="W2")
    parser.add_argument("--contender", default="fxfuse")
    parser.add_argument("--steps", type=int, default=70)
    parser.add_argument("--skip", type=int, default=3, help="first steps that are not counted")
    parser.add_argument("--out", default=str(rows.RESULTS / "steadiness.jsonl"))
    args = parser.parse_args()
    contender, workload = Contender.of(args.contender), named(args.workload)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    peers.preimport(contender, workload)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        training = Training(peers.prepare(contender, workload, device, Path(scratch)), workload, device)
        collections = Collections()
        found = summary(steps_of(training, args.steps, collections), collections.found, args.skip)
    rows.Writer(args.out).write(kind="steadiness", workload=args.workload, contender=args.contender, **found)
    full = sum(generation == 2 for _, generation, _ in found["collections"])
    sys.stdout.write(
        f"{args.workload} {args.contender}: mean {found['ms_mean']} ms, median {found['ms']}, slowest "
        f"{found['ms_max']} of {found['steps']}; full collections {full}\n"
    )


if __name__ == "__main__":
    main()
