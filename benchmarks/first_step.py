"""Where the first step's seconds go: one workload, few layers, optimize and the first two steps.

    python -m benchmarks.first_step --workload W1 --layers 2             # twice, in processes of their own: cold caches, then warm ones
    python -m benchmarks.first_step --workload W1 --samples              # and where the seconds went, by samples of the stacks
    python -m benchmarks.first_step --workload W2 --layers 2 --profile   # this process, under a profiler

The clocks of the first form (stages nest) cost nothing. The second prints seconds inside each stage of the
compiler and the functions with most time of their own; the profiler doubles what Python takes.
"""

from __future__ import annotations

import argparse
import cProfile
import faulthandler
import os
import pstats
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

import torch  # noqa: E402

from benchmarks import peers, rows  # noqa: E402
from benchmarks.jobs import Contender  # noqa: E402
from benchmarks.stack_samples import Samples  # noqa: E402
from benchmarks.step_clocks import WAITED, Clocks  # noqa: E402
from benchmarks.training_steps import Training  # noqa: E402
from benchmarks.workloads import WORKLOADS, Workload  # noqa: E402

# (function, a part of its file's path): a stage of the compiler
STAGES = (
    ("convert_frame", "_dynamo"), ("rewrite_graph", "rewriting"), ("canonicalize", "canonical"), ("find_regions", "regions"),
    ("name_of", "rules"), ("validate", "validation"), ("plan_residuals", "residuals"), ("derive_backward", "derivation"),
    ("compile_eager", "aot"), ("partition", "fxfuse/aot"), ("bufferize", "bufferize"), ("specialize", "kernels"),
    ("choose", "tuning"), ("times_on_device", "tuning"), ("compile", "triton/compiler"), ("make_cubin", "triton"),
    ("make_llir", "triton"), ("make_ttgir", "triton"), ("load", "kernels/library"),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default="W1")
    parser.add_argument("--layers", type=int, default=2, help="0: as many as the model has")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--samples", action="store_true")
    parser.add_argument("--clock", default="", help=argparse.SUPPRESS)
    parser.add_argument("--out", default="", help="append a row of each run to this file")
    parser.add_argument("--stuck", type=float, default=0, help="print the stack every so many seconds")
    given = parser.parse_args()
    if given.stuck:
        faulthandler.dump_traceback_later(given.stuck, repeat=True)
    if given.profile or given.clock:
        here(given)
        return
    with tempfile.TemporaryDirectory() as folder:
        caches = {"FXFUSE_CACHE_DIR": f"{folder}/fxfuse", "TRITON_CACHE_DIR": f"{folder}/triton"}
        for label in ("cold", "warm"):
            command = [sys.executable, "-m", "benchmarks.first_step", *sys.argv[1:], "--clock", label]
            subprocess.run(command, env=os.environ | caches, cwd=ROOT, check=True)


def workload_of(given: argparse.Namespace) -> Workload:
    workload = replace(WORKLOADS[given.workload], layers=given.layers, tiny=given.tiny)
    return replace(workload, batch=2, length=48) if given.tiny else workload


def here(given: argparse.Namespace) -> None:
    """In this process: builds, optimizes, trains two steps."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    workload = workload_of(given)
    training = Training(peers.prepare(Contender.of("fxfuse"), workload, device, Path(".")), workload, device)
    clocks = Clocks() if given.clock else None
    if clocks:
        clocks.of_steps(training)
    took = []
    for index in range(2):
        profile = cProfile.Profile()
        samples = Samples() if given.samples and index == 0 else nullcontext()
        start = time.perf_counter()
        if not clocks:
            profile.enable()
        with samples:
            training.step(index)
            if device == "cuda":
                (clocks.clocked(WAITED, torch.cuda.synchronize) if clocks else torch.cuda.synchronize)()
        profile.disable()
        took.append(time.perf_counter() - start)
        sys.stdout.write(f"== {workload.describe()}, {given.clock or 'profiled'}: step {index} took {took[-1]:.2f} s\n")
        if not clocks:
            show(pstats.Stats(profile))
        elif index == 0:
            sys.stdout.write(clocks.text())
        if isinstance(samples, Samples):
            sys.stdout.write(samples.text())
    if clocks and given.out:
        rows.Writer(given.out).write(
            kind="first_step", workload=given.workload, layers=given.layers, caches=given.clock, contender="fxfuse",
            first_step_s=round(took[0], 2), second_step_s=round(took[1], 3),
            stages={label.strip(): round(seconds, 2) for label, seconds, _ in clocks.rows()})  # fmt: skip


def show(stats: pstats.Stats) -> None:
    sys.stdout.write(f"{stats.total_calls} calls of functions\n")  # type: ignore[attr-defined]  # comparable on a shared machine
    for name, where in STAGES:
        for (path, _, function), (calls, _, own, total, _) in stats.stats.items():  # type: ignore[attr-defined]
            if function == name and where in path and total > 0.05:
                sys.stdout.write(f"{total:8.2f} s  {own:7.2f} own  {calls:6d} calls  {function}  ({path[-50:]})\n")
    stats.sort_stats("tottime").print_stats(12)


if __name__ == "__main__":
    main()
