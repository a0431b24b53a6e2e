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
import statistics
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
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

from benchmarks import peers, rows  # noqa: E402
from benchmarks.jobs import Job, Signals, options  # noqa: E402
from benchmarks.workloads import Workload, batches  # noqa: E402

GIB = 2**30
# a few gradients that stand for the rest: first and last layer, each kind of linear, a norm
PROBES = (
    "layers.0.self_attn.q_proj.lora_B.weight",
    "layers.0.self_attn.v_proj.lora_A.weight",
    "layers.{last}.self_attn.o_proj.lora_A.weight",
    "layers.{last}.mlp.down_proj.lora_A.weight",
    "layers.0.self_attn.q_proj.weight",
    "layers.{last}.mlp.down_proj.weight",
    "layers.0.input_layernorm.weight",
)


class Training:
    """Forward, backward, AdamW, zero_grad over rotating batches; labels are the ids, nothing is masked or clipped."""

    def __init__(self, prepared: peers.Prepared, workload: Workload, device: str) -> None:
        self.model, self.autocast, self.device = prepared.model, prepared.autocast, device
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=device == "cuda")
        self.batches = batches(workload, device)
        last = workload.config["num_hidden_layers"] - 1
        self.probes = {probe.format(last=last) for probe in PROBES}

    def step(self, index: int, norms: dict[str, float] | None = None) -> torch.Tensor:
        """The loss, detached; fills `norms` with gradient norms by name and their total under 'all'."""
        ids = self.batches[index % len(self.batches)]
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.autocast):
            out = self.model(input_ids=ids, labels=ids)
            loss = out.loss
        loss.backward()
        if norms is not None:
            norms.update(self.gradient_norms())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def gradient_norms(self) -> dict[str, float]:
        found, squares = {}, []
        for name, parameter in self.model.named_parameters():
            if parameter.grad is None:
                continue
            norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
            squares.append(norm.double().square())
            key = name[name.index("layers.") :].replace(".default", "") if "layers." in name else name
            if key in self.probes:
                found[key] = norm.item()
        return {**found, "all": torch.stack(squares).sum().sqrt().item()}


class Stopwatch:
    """Milliseconds of steps: CUDA events on a GPU (nothing waits between timed steps), the clock on a CPU."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.marks: list[tuple[Any, Any]] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        start = self._mark()
        yield
        self.marks.append((start, self._mark()))

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self) -> list[float]:
        if not self.cuda:
            return [(end - start) * 1e3 for start, end in self.marks]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in self.marks]


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
    cuda = device == "cuda"
    torch.manual_seed(0)
    signals.stage("building the model")
    start = time.perf_counter()
    prepared = peers.prepare(job.contender, job.workload, device, Path(args.scratch))
    training = Training(prepared, job.workload, device)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        base["base_gib"] = round(torch.cuda.memory_allocated() / GIB, 3)
        torch.cuda.reset_peak_memory_stats()
    base["build_s"] = round(time.perf_counter() - start, 2)
    if prepared.optimize_s is not None:
        base["optimize_s"] = round(prepared.optimize_s, 2)
    writer = rows.Writer(args.out)
    if args.parity:
        writer.write(kind="parity", **base, **parity(training, args.parity, signals))
        return
    writer.write(kind="step", **base, **timed(training, job, args, signals, cuda))
    signals.stage("profiling one step")
    if cuda and not args.no_count:
        from benchmarks import kernel_profile

        profile = kernel_profile.of(lambda: training.step(0), Path(args.scratch))
        writer.write(kind="profile", **base, **profile.row())
        if job.profiled:
            with open(Path(args.out).with_name("profiles.txt"), "a") as file:
                file.write(f"\n=== {job.name}\n{profile.text()}\n\n{profile.programs}\n")


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


def timed(
    training: Training, job: Job, args: argparse.Namespace, signals: Signals, cuda: bool
) -> dict[str, Any]:
    """Warmup steps with their gradient norms, then steps between events only."""
    losses: list[torch.Tensor] = []
    norms: list[dict[str, float]] = []
    watch = Stopwatch(cuda)
    first_step_s = 0.0
    for index in range(args.warmup):
        signals.stage(f"step {index}")
        start = time.perf_counter()
        norms.append({})
        losses.append(training.step(index, norms[-1]))
        if cuda:
            torch.cuda.synchronize()
        if index == 0:
            first_step_s = time.perf_counter() - start
            signals.stage(f"step 0 took {first_step_s:.1f} s")
    memory = {}
    if cuda:
        memory["first_peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 3)
    with signals.timing():
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        for index in range(args.warmup, args.warmup + args.steps):
            with watch.step():
                losses.append(training.step(index))
        ms = watch.ms()
    signals.stage("timed")
    if cuda:
        memory["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 3)
        memory["reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 3)
    median = statistics.median(ms)
    found = dict(
        ms=round(median, 2),
        ms_min=round(min(ms), 2),
        ms_max=round(max(ms), 2),
        ms_steps=[round(value, 2) for value in ms],
        tokens_s=round(job.workload.tokens / median * 1e3, 1),
        first_step_s=round(first_step_s, 2),
        loss0=losses[0].item(),
        grad_norm=norms[0]["all"],
        losses=[round(loss.item(), 5) for loss in losses],
        grad_norms=[n["all"] for n in norms],
        gradients=norms[0],
        trained=sum(p.numel() for p in training.parameters),
        trained_dtype=sorted({str(p.dtype).removeprefix("torch.") for p in training.parameters}),
        **memory,
        **graph_breaks(),
    )
    return found | (fused_by(training.model) if job.contender.base == "fxfuse" else {})


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
