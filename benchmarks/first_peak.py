"""What the first steps under a memory budget take, step by step, and what is alive at each peak.

    python benchmarks/first_peak.py --job "W1:fxfuse[memory=7GiB]" [--steps 4] [--plain]
    python benchmarks/first_peak.py --job "W1:fxfuse[memory=1MiB]" --tiny --cpu --layers 2 --length 64

A process of its own with the caches it finds (FXFUSE_CACHE_DIR, TRITON_CACHE_DIR). With --plain no allocation is recorded, which slows
steps down, and the peaks alone are told. Exit code 1: a step was above its budget.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    importlib.import_module("benchmarks")
    del sys.path[0]  # as in step_worker.py

import torch  # noqa: E402

from benchmarks import budgets, memory_profile, peers  # noqa: E402
from benchmarks.jobs import Job, options  # noqa: E402
from benchmarks.training_steps import GIB, Training  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options(parser)
    parser.add_argument("--job", required=True)
    parser.add_argument("--plain", action="store_true")
    parser.set_defaults(steps=4, profiled=False)
    args = parser.parse_args()
    job = Job.of(args.job, args)
    peers.preimport(job.contender, job.workload)
    cuda = torch.cuda.is_available() and not args.cpu
    with tempfile.TemporaryDirectory() as scratch:
        prepared = peers.prepare(job.contender, job.workload, "cuda" if cuda else "cpu", Path(scratch))
    budget = job.contender.budgets[0]
    budgets.apply(budget, prepared, job)
    training = Training(prepared, job.workload, "cuda" if cuda else "cpu")
    peaks = [_told(training, index, cuda and not args.plain) for index in range(args.steps)]
    import fxfuse

    plan = fxfuse.report(training.model).memory
    sys.stdout.write(f"{job.name}: peaks {', '.join(f'{peak:.3f}' for peak in peaks)} GiB; plan {plan and plan.predicted_peak / GIB}\n")
    return int(cuda and plan is not None and max(peaks) * GIB > plan.budget)


def _told(training: Training, index: int, recorded: bool) -> float:
    """The peak of a step in GiB; what is alive there is printed."""
    start = time.perf_counter()
    if recorded:
        sys.stdout.write(f"--- step {index}\n{memory_profile.of(lambda: training.step(index))}\n")
    else:
        if training.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        training.step(index)
    cuda = training.device == "cuda"
    peak = torch.cuda.max_memory_allocated() / GIB if cuda else 0.0
    reserved = torch.cuda.memory_reserved() / GIB if cuda else 0.0
    sys.stdout.write(f"step {index}: {peak:.3f} GiB, reserved {reserved:.3f}, {time.perf_counter() - start:.1f} s\n")
    sys.stdout.flush()
    return peak


if __name__ == "__main__":
    sys.exit(main())
