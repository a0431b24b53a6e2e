"""One contender of one workload in a process of its own: builds, waits for the GPU, trains, writes its rows.

Started by steps.py, which says when the GPU is free and may hold back the processes that wait while this one times.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import logging
import os
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    importlib.import_module("benchmarks")
    del sys.path[0]  # its folder `kernels` would pass for the package of that name, which bitsandbytes tries
    if importlib.util.find_spec("fxfuse") is None:
        sys.path.insert(0, str(ROOT))
    if ":unsloth" in " ".join(sys.argv):
        importlib.import_module("unsloth")  # before torch: it sets torch's environment

import torch  # noqa: E402

from benchmarks import budgets, longest, peers, rows  # noqa: E402
from benchmarks.jobs import Job, Signals, options  # noqa: E402
from benchmarks.training_steps import GIB, Training, timed  # noqa: E402
from fxfuse.training import saved_for_backward  # noqa: E402


def fused_by(model: torch.nn.Module) -> dict[str, Any]:
    """What fxfuse says of the very run that was measured."""
    import fxfuse

    report = fxfuse.report(model)
    sys.stdout.write(f"{report}\n")
    fused: Counter[str] = Counter()
    implementation: dict[str, set[str]] = {}
    declined: Counter[str] = Counter()
    for site in report.sites:
        if site.status in ("fused", "served"):
            fused[site.rule] += site.count
            implementation.setdefault(site.rule, set()).add(site.implementation)
        else:
            reason = site.reason.splitlines()[0][:200] if site.reason else "no reason"
            declined[f"{site.rule} ({site.module}), {site.status}: {reason}"] += site.count
    return dict(
        fused=dict(sorted(fused.items())),
        implementation={rule: "+".join(sorted(names)) for rule, names in sorted(implementation.items())},
        declined=dict(declined),
        report_errors=[str(e)[:300] for e in report.errors],
        notes=[str(n)[:200] for n in report.notes][:8],
    )


def graph_breaks() -> dict[str, Any]:
    counters = torch._dynamo.utils.counters
    return dict(
        graph_breaks=sum(counters["graph_break"].values()),
        graphs=counters["stats"].get("unique_graphs", 0),
        **(
            {"break_reasons": [k[:160] for k in list(counters["graph_break"])[:4]]}
            if counters["graph_break"]
            else {}
        ),
    )


def run(job: Job, args: argparse.Namespace, signals: Signals, base: dict[str, Any]) -> None:
    device = "cuda" if torch.cuda.is_available() and not args.cpu else "cpu"
    torch.manual_seed(0)
    signals.stage("building the model")
    start = time.perf_counter()
    prepared = peers.prepare(job.contender, job.workload, device, Path(args.scratch))
    base["build_s"] = round(time.perf_counter() - start, 2)
    writer = rows.Writer(args.out)
    if args.cap:
        longest.search(job, prepared, args, signals, lambda **found: writer.write(**base, **found))
        return
    for budget in job.contender.budgets or (budgets.NONE,):
        columns = base
        try:
            if budget is not budgets.NONE:
                signals.stage(f"a budget of {budget}")
                columns = base | budgets.columns(budget, job)
                budgets.apply(budget, prepared, job)
            measure(job, prepared, args, signals, columns, writer)
        except Exception as error:  # a budget that does not fit is a row; the next one may
            if len(job.contender.budgets) < 2:
                raise
            failed = str(error).strip().splitlines() or [""]
            writer.write(kind="step", **columns, failed=f"{type(error).__name__}: {failed[0][:400]}", stage=signals.last)


def measure(job: Job, prepared: peers.Prepared, args: argparse.Namespace, signals: Signals, base: dict[str, Any],
            writer: rows.Writer) -> None:  # fmt: skip
    """Rows of one prepared model: its steps, and one more of them profiled; or its losses, step by step."""
    cuda = any(p.is_cuda for p in prepared.model.parameters())
    training = Training(prepared, job.workload, "cuda" if cuda else "cpu")
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        base["base_gib"] = round(torch.cuda.memory_allocated() / GIB, 3)
        torch.cuda.reset_peak_memory_stats()
    if prepared.optimize_s is not None:
        base["optimize_s"] = round(prepared.optimize_s, 2)
    if args.parity:
        writer.write(kind="parity", **base, **parity(training, args.parity, signals))
        return
    found = timed(training, args, signals, cuda) | graph_breaks()
    if job.contender.base == "fxfuse":
        found |= fused_by(training.model)
    if job.contender.budgets:
        found |= budgets.planned(training)
    if not cuda:
        found["saved_gib"] = saved_for_backward(training.model, training.batches[0]) / GIB
    writer.write(kind="step", **base, **found)
    signals.stage("profiling one step")
    if cuda and not args.no_count:
        from benchmarks import kernel_profile, memory_profile

        profile = kernel_profile.of(lambda: training.step(0), Path(args.scratch))
        writer.write(kind="profile", **base, **profile.row())
        if job.profiled:
            folder = Path(args.out)
            with open(folder.with_name("profiles.txt"), "a") as file:
                file.write(f"\n=== {job.name}\n{profile.text()}\n\n{profile.programs}\n")
            try:
                told = memory_profile.of(lambda: training.step(0))
            except SystemError as error:  # torch 2.11's recorder, in steps that replay checkpoints
                told = f"no trace: {error}"
            with open(folder.with_name("memory.txt"), "a") as file:
                file.write(f"\n=== {job.name}\n{told}\n")


def parity(training: Training, last: int, signals: Signals) -> dict[str, Any]:
    """Losses and gradient norms of steps 0 to `last`."""
    losses, norms = [], []
    first: dict[str, float] = {}
    for index in range(last + 1):
        signals.stage(f"parity step {index}")
        found: dict[str, float] = {}
        losses.append(training.step(index, found).item())
        norms.append(found["all"])
        first = first or found
    return dict(losses=losses, grad_norms=norms, gradients=first, loss0=losses[0], grad_norm=norms[0])


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(name)s %(message)s")
    parser = argparse.ArgumentParser()
    options(parser)
    parser.add_argument("--job", required=True)
    parser.add_argument("--signals", required=True)
    parser.add_argument("--scratch", required=True)
    parser.add_argument("--profiled", action="store_true")
    args = parser.parse_args()
    signals = Signals(Path(args.signals))
    start = time.perf_counter()
    base: dict[str, Any] = {}
    try:
        job = Job.of(args.job, args)
        base |= job.columns()
        peers.preimport(job.contender, job.workload)
        base["import_s"] = round(time.perf_counter() - start, 1)
        signals.wait_for_turn()
        run(job, args, signals, base)
    except BaseException as error:  # recorded as a row, whatever it is
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        failed = dict(failed=f"{type(error).__name__}: {lines[0][:400]}", stage=signals.last)
        with open(signals.folder / "failed", "w") as file:
            json.dump({**base, **failed}, file)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a peer's threads and a CUDA context of 100 GiB are not waited for


if __name__ == "__main__":
    main()
