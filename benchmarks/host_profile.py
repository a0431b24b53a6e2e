"""What a training step asks of the host: how long Python takes to hand it to the GPU, against how long the step takes, and where.

    python -m benchmarks.host_profile --workload W4 --steps 12                 # on a GPU
    python -m benchmarks.host_profile --workload W4 --layers 2 --tiny          # without one: the functions only

Steps between events with nothing awaited (as steps.py times them), with the host's clock from a step's begin to its return, once plain
and once with samples of the stacks. Where the GPU is behind, the host's time is short; where it is as long as the step, the step waits
for the host. Then the places at which one more step waits for the device.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import peers, rows
from benchmarks.jobs import Contender
from benchmarks.stack_samples import Samples
from benchmarks.training_steps import Stopwatch, Training
from benchmarks.workloads import WORKLOADS


def timed(training: Training, steps: int, cuda: bool) -> tuple[float, float]:
    """Medians of the steps' milliseconds and of the host's."""
    watch, host = Stopwatch(cuda), []
    for index in range(steps):
        start = time.perf_counter()
        with watch.step():
            training.step(index)
        host.append((time.perf_counter() - start) * 1e3)
    return statistics.median(watch.ms()), statistics.median(host)


def waits(training: Training) -> Counter[str]:
    """Where a step waits for the device: file and line, and how often."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            training.step(0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))


def attentions(model: torch.nn.Module) -> list[str]:
    """What fxfuse says of the attention, if it is that which trains."""
    import fxfuse

    return [f"{site.count} x {site.implementation}: {site.reason}" for site in fxfuse.report(model).sites if site.rule == "attention"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default="W4")
    parser.add_argument("--layers", type=int, default=0, help="0: as many as the model has")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--contender", default="fxfuse")
    parser.add_argument("--out", default="", help="append a row to this file")
    given = parser.parse_args()
    cuda = torch.cuda.is_available()
    workload = replace(WORKLOADS[given.workload], layers=given.layers, tiny=given.tiny)
    workload = replace(workload, batch=1, length=64) if given.tiny else workload
    device = "cuda" if cuda else "cpu"
    training = Training(peers.prepare(Contender.of(given.contender), workload, device, Path(".")), workload, device)
    start = time.perf_counter()
    for index in range(given.warmup):
        training.step(index)
        if cuda:
            torch.cuda.synchronize()
        sys.stdout.write(f"step {index} ended after {time.perf_counter() - start:.2f} s\n")
    ms, host = timed(training, given.steps, cuda)
    with Samples() as samples:
        timed(training, given.steps, cuda)
    found = {"ms": round(ms, 1), "host_ms": round(host, 1)}
    sys.stdout.write(f"== {workload.describe()} {given.contender}: {found}\n")
    if cuda:
        awaited = waits(training)
        sys.stdout.write(f"waits: {sum(awaited.values())}: {dict(awaited)}\n")
        found["waits"] = sum(awaited.values())
    for said in attentions(training.model):
        sys.stdout.write(f"attention: {said}\n")
    sys.stdout.write(f"seconds in {given.steps} steps:\n{samples.text(given.steps * 0.002)}")
    if given.out:
        rows.Writer(given.out).write(kind="host_step", workload=given.workload, layers=given.layers, contender=given.contender, **found)


if __name__ == "__main__":
    main()
