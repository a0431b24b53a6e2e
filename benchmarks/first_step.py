"""Where the first step's seconds go: one workload, few layers, optimize and the first two steps under a profiler.

    python benchmarks/first_step.py --workload W2 --layers 2

Prints seconds inside each stage of the compiler (cumulative; stages nest), then the functions with most time of their own.
"""

from __future__ import annotations

import argparse
import cProfile
import faulthandler
import pstats
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

import torch  # noqa: E402

from benchmarks import peers  # noqa: E402
from benchmarks.jobs import Contender  # noqa: E402
from benchmarks.training_steps import Training  # noqa: E402
from benchmarks.workloads import WORKLOADS  # noqa: E402

# (function, a part of its file's path): a stage of the compiler
STAGES = (
    ("convert_frame", "_dynamo"), ("rewrite_graph", "rewriting"), ("canonicalize", "canonical"), ("find_regions", "regions"),
    ("name_of", "rules"), ("validate", "validation"), ("plan_residuals", "residuals"), ("derive_backward", "derivation"),
    ("compile_eager", "aot"), ("partition", "fxfuse/aot"), ("bufferize", "bufferize"), ("specialize", "kernels"),
    ("choose", "tuning"), ("times_on_device", "tuning"), ("compile", "triton/compiler"), ("make_cubin", "triton"),
    ("make_llir", "triton"), ("make_ttgir", "triton"), ("load", "kernels/library"),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", default="W2")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--stuck", type=float, default=0, help="print the stack every so many seconds")
    given = parser.parse_args()
    if given.stuck:
        faulthandler.dump_traceback_later(given.stuck, repeat=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    workload = replace(WORKLOADS[given.workload], layers=given.layers, tiny=given.tiny)
    if given.tiny:
        workload = replace(workload, batch=1, length=64)
    training = Training(peers.prepare(Contender.of("fxfuse"), workload, device, Path(".")), workload, device)
    for index in range(2):
        profile = cProfile.Profile()
        start = time.perf_counter()
        profile.enable()
        training.step(index)
        if device == "cuda":
            torch.cuda.synchronize()
        profile.disable()
        print(f"== {workload.describe()}: step {index} took {time.perf_counter() - start:.2f} s")
        show(pstats.Stats(profile))


def show(stats: pstats.Stats) -> None:
    for name, where in STAGES:
        for (path, _, function), (calls, _, own, total, _) in stats.stats.items():  # type: ignore[attr-defined]
            if function == name and where in path and total > 0.05:
                print(f"{total:8.2f} s  {own:7.2f} own  {calls:6d} calls  {function}  ({path[-50:]})")
    stats.sort_stats("tottime").print_stats(12)


if __name__ == "__main__":
    main()
