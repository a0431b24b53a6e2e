"""A linear and its loss, forward and backward: ours against its own matrix products, eager, Inductor and the peers.

    python benchmarks/linear_loss.py [--only fxfuse,gemms] [--sweep] [--profile] [--probe] [--out FILE] [--dry]

T 8192, H 4096, V 128256, bfloat16, frozen and trained head. ``gemms`` are the products alone (two for a frozen head, three for a
trained one, one more where logits are computed again), timed right before and after each contender, so that a ratio is of neighbours.
Extra GiB: the most that was allocated beyond inputs while it ran; for a trained head that includes the gradient of the weight.
Unsloth runs in a process of its own. ``--sweep``: chunk sizes. ``--profile``: time by kernel. ``--probe``: what a product over a number
of rows that only the device knows costs.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not benchmarks/: this folder's names are also packages

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks import rows  # noqa: E402

Loss = Callable[..., Tensor]  # of hidden, weight, labels, cotangents of rows; with an adapter, of its two factors
RANK = 16


@dataclass(frozen=True)
class Shape:
    tokens: int = 8192
    hidden: int = 4096
    classes: int = 128256

    def __str__(self) -> str:
        return f"T{self.tokens} H{self.hidden} V{self.classes}"


@dataclass(frozen=True)
class Case:
    """mode: that of ``fxfuse::linear_loss``; gemms: how many products of the head's size it cannot do without."""

    name: str
    mode: str
    loss: Loss
    trained: bool
    ignored: float = 0.0
    adapted: bool = False

    @property
    def gemms(self) -> int:
        return 2 + self.trained + (self.mode == "recompute")


def mean_loss(h: Tensor, w: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w).float(), labels)


def row_losses(h: Tensor, w: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """A loss a row, which something outside of the graph weighs: every row has a cotangent of its own."""
    return F.cross_entropy(F.linear(h, w).float(), labels, reduction="none")


def smoothed(h: Tensor, w: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    z = 30.0 * torch.tanh(F.linear(h, w) / 30.0)
    return F.cross_entropy(z.float(), labels, label_smoothing=0.1)


def adapted_loss(h: Tensor, w: Tensor, labels: Tensor, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """An adapter on the output head, which is trained; the head is not."""
    return F.cross_entropy((F.linear(h, w) + 2.0 * F.linear(F.linear(h, down), up)).float(), labels)


def cases() -> list[Case]:
    return [
        Case("mean, frozen", "total", mean_loss, False),
        Case("mean, trained", "total", mean_loss, True),
        Case("per row, frozen", "rows", row_losses, False),
        Case("per row, trained", "recompute", row_losses, True),
        Case("mean, frozen, half ignored", "total", mean_loss, False, ignored=0.5),
        Case("mean, trained, half ignored", "total", mean_loss, True, ignored=0.5),
        Case("mean, frozen, quarter ignored", "total", mean_loss, False, ignored=0.25),
        Case("mean, frozen, three quarters ignored", "total", mean_loss, False, ignored=0.75),
        Case("softcap and smoothing, frozen", "total", smoothed, False),
        Case("mean, frozen, adapter r16", "total", adapted_loss, False, adapted=True),
    ]


class Inputs:
    """hidden [T, H], weight [V, H], labels [T], cotangents of rows [T]."""

    def __init__(self, shape: Shape, case: Case, device: str) -> None:
        torch.manual_seed(0)
        make = partial(torch.randn, device=device, dtype=torch.bfloat16)
        self.h = make(shape.tokens, shape.hidden).requires_grad_()
        self.w = (make(shape.classes, shape.hidden) * 0.02).requires_grad_(case.trained)
        self.labels = torch.randint(0, shape.classes, (shape.tokens,), device=device)
        if case.ignored:
            # Turns of a chat: runs of 64 tokens that count or do not.
            ignored = torch.randperm(shape.tokens // 64, device=device)[: int(case.ignored * (shape.tokens // 64))]
            self.labels.view(-1, 64)[ignored] = -100
        self.weight = torch.rand(shape.tokens, device=device)
        self.adapter = [(make(*size) * 0.02).requires_grad_() for size in ((RANK, shape.hidden), (shape.classes, RANK))
                        if case.adapted]

    def run(self, loss: Loss) -> Any:
        """Forward and backward; the gradients are freed with the result."""
        out = loss(self.h, self.w, self.labels, self.weight, *self.adapter)
        wanted = (self.h, *([self.w] if self.w.requires_grad else []), *self.adapter)
        return torch.autograd.grad(out, wanted, self.weight if out.dim() else None)


def products(inputs: Inputs, case: Case) -> None:
    """The products of the head at full size, none of which can be left out."""
    with torch.no_grad():
        logits = inputs.h @ inputs.w.t()
        if case.mode == "recompute":
            torch.mm(inputs.h, inputs.w.t(), out=logits)
        _ = logits @ inputs.w
        if case.trained:
            _ = logits.t() @ inputs.h


# --- contenders ----------------------------------------------------------------------------------------------


def ours(case: Case) -> Loss:
    """The head as a model has it: its own sizes are constants. (As plain tensors under ``dynamic=True`` they would not be.)"""
    from fxfuse.backend import Backend

    return torch.compile(case.loss, backend=Backend(strict=True), dynamic=False)


@contextmanager
def reported() -> Iterator[list[Any]]:
    """The sites of what is compiled meanwhile, so that a row says whether it measured the fused op."""
    from fxfuse import backend

    records: list[Any] = []
    make = backend.new_record
    backend.new_record = lambda: records.append(make()) or records[-1]  # type: ignore[func-returns-value]
    sites: list[Any] = []
    try:
        yield sites
    finally:
        backend.new_record = make
        sites += [site for record in records for site in record.sites]


def peers(case: Case, unsloth: bool) -> Iterator[tuple[str, Callable[[], Loss]]]:
    """The peers that have this loss, as their own model patches call them."""
    plain = case.loss is mean_loss
    if unsloth:
        if plain:
            yield "unsloth", _unsloth
        return
    yield "eager", lambda: case.loss
    yield "inductor", lambda: torch.compile(case.loss, dynamic=False)
    if plain:
        yield "liger", _liger
        yield "cce", _cce


def _liger() -> Loss:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return lambda h, w, labels, weight: LigerFusedLinearCrossEntropyFunction.apply(h, w, labels)[0]


def _cce() -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    return lambda h, w, labels, weight: linear_cross_entropy(h, w, labels, impl="cce")


def _unsloth() -> Loss:
    from unsloth_zoo.fused_losses.cross_entropy_loss import unsloth_fused_ce_loss

    return lambda h, w, labels, weight: unsloth_fused_ce_loss(None, h[None], w, None, labels[None], shift_labels=False)


# --- measurement ---------------------------------------------------------------------------------------------


def milliseconds(run: Callable[[], object], reps: int, warm: int = 2) -> tuple[float, float, float]:
    """Median, least, most; the host runs ahead, as in a step. On a CPU: 0, the logic is what is exercised."""
    for _ in range(warm):
        run()
    if not torch.cuda.is_available():
        return 0.0, 0.0, 0.0
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(reps + 2)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    # Before the first the device waits for the host.
    times = [before.elapsed_time(after) for before, after in pairwise(marks[1:])]
    return statistics.median(times), min(times), max(times)


def extra_gib(run: Callable[[], object]) -> float | None:
    """What one run allocates at most beyond what was there before."""
    if not torch.cuda.is_available():
        return None
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**30, 3)


def bench(case: Case, shape: Shape, name: str, build: Callable[[], Loss], device: str, out: rows.Writer, reps: int,
          **more: Any) -> None:
    """One row: the contender, the products beside it, and their ratio."""
    torch._dynamo.reset()
    base: dict[str, Any] = dict(op="linear_loss", shape=str(shape), case=case.name, trained=case.trained, contender=name, **more)
    try:
        inputs = Inputs(shape, case, device)
        run = partial(inputs.run, build())
        with reported() as sites:
            run()
        if name == "fxfuse":
            loss = [site for site in sites if site.rule == "linear_loss"]
            if not any(site.status == "fused" for site in loss):
                raise RuntimeError("not fused: " + "; ".join(site.reason for site in loss))
        floor, *_ = milliseconds(partial(products, inputs, case), reps)
        ms, least, most = milliseconds(run, reps)
        again, *_ = milliseconds(partial(products, inputs, case), reps)
        floor = (floor + again) / 2
        row = out.write(**base, ms=round(ms, 3), ms_min=round(least, 3), ms_max=round(most, 3), gemms=case.gemms,
                        gemms_ms=round(floor, 3), over_gemms=round(ms / floor, 4) if floor else None, extra_gib=extra_gib(run))
        print({k: row[k] for k in ("case", "contender", "ms", "gemms_ms", "over_gemms", "extra_gib")} | more, flush=True)
    except Exception as error:  # a peer that fails is a row, not the end of the run
        out.write(**base, failed=f"{type(error).__name__}: {str(error)[:300]}")
        print(case.name, name, f"{type(error).__name__}: {str(error)[:200]}", flush=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def sweep(shape: Shape, device: str, out: rows.Writer, reps: int) -> None:
    """Chunks of every number of rows: what the budget buys."""
    from fxfuse.linear_loss import chunks

    chosen = chunks.rows_in_chunk
    for size in (512, 896, 1024, 1152, 1280, 1408, 1664, 2048, 2816, 4096):
        chunks.rows_in_chunk = lambda *_, size=size: size  # type: ignore[assignment]
        for case in cases()[:2]:
            bench(case, shape, "fxfuse", partial(ours, case), device, out, reps, chunk=size)
    chunks.rows_in_chunk = chosen


def profile(shape: Shape, device: str) -> None:
    """Where the time of one forward and backward goes, by kernel; which configurations of kernels were timed, and chosen."""
    logging.basicConfig()
    logging.getLogger("fxfuse").setLevel(logging.INFO)
    for case in (case for case in cases() if case.name in ("mean, frozen", "mean, trained", "mean, frozen, half ignored")):
        torch._dynamo.reset()
        inputs = Inputs(shape, case, device)
        run = partial(inputs.run, ours(case))
        for _ in range(3):
            run()
            torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]) as seen:
            run()
        print(case.name)
        print(seen.key_averages().table(sort_by="cuda_time_total", row_limit=14, max_name_column_width=70), flush=True)


def probe(shape: Shape, device: str, out: rows.Writer, reps: int) -> None:
    """The three products of a chunk, and of all rows: cuBLAS, and grouped products whose number of rows lies on the device."""
    for chunk in sorted({min(1024, shape.tokens), shape.tokens}):
        inputs = Inputs(shape, cases()[0], device)
        x, w = inputs.h.detach()[:chunk], inputs.w.detach()
        logits = x @ w.t()
        gradient, sums = torch.empty_like(x), torch.empty_like(w)
        runs: dict[str, Callable[[], object]] = {
            "mm logits": partial(torch.mm, x, w.t(), out=logits),
            "mm hidden gradient": partial(torch.mm, logits, w, out=gradient),
            "mm weight gradient": partial(torch.mm, logits.t(), x, out=sums),
        }
        for part in (1.0, 0.75, 0.5, 0.25, 0.0):
            ends = torch.tensor([int(part * chunk)], device=device, dtype=torch.int32)
            runs[f"grouped logits, {part:.0%} of the rows"] = partial(torch._grouped_mm, x, w.t()[None], offs=ends)
            runs[f"grouped hidden gradient, {part:.0%} of the rows"] = partial(torch._grouped_mm, logits, w[None], offs=ends)
            if part:
                runs[f"grouped weight gradient, {part:.0%} of the rows"] = partial(torch._grouped_mm, logits.t(), x, offs=ends)
        for name, run in runs.items():
            base: dict[str, Any] = dict(op="linear_loss probe", shape=str(shape), case=name, chunk=chunk)
            try:
                ms, *_ = milliseconds(run, reps)
                row = out.write(**base, ms=round(ms, 4))
            except RuntimeError as error:
                row = out.write(**base, failed=str(error)[:200])
            print({k: row.get(k) for k in ("case", "chunk", "ms", "failed")}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="contenders, joined by commas")
    parser.add_argument("--cases", default="", help="parts of case names, joined by commas")
    parser.add_argument("--out", default=str(rows.RESULTS / "linear_loss.jsonl"))
    parser.add_argument("--reps", type=int, default=9)
    for flag in ("sweep", "profile", "probe", "dry", "unsloth-process"):
        parser.add_argument(f"--{flag}", action="store_true")
    a = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not a.dry else "cpu"
    shape = Shape(256, 32, 264) if a.dry else Shape()
    out = rows.Writer(a.out)
    if a.unsloth_process:
        import unsloth  # noqa: F401
    if a.profile or a.sweep or a.probe:
        if a.profile:
            profile(shape, device)
        if a.sweep:
            sweep(shape, device, out, a.reps)
        if a.probe:
            probe(shape, device, out, a.reps)
        return
    chosen = [case for case in cases() if not a.cases or any(part in case.name for part in a.cases.split(","))]
    names = set(filter(None, a.only.split(",")))
    for case in chosen:
        contenders = [("fxfuse", partial(ours, case)), *peers(case, False)] if not a.unsloth_process else list(peers(case, True))
        for name, build in contenders:
            if not names or name in names:
                bench(case, shape, name, build, device, out, a.reps)
    if not a.unsloth_process and (not names or "unsloth" in names) and device == "cuda":
        path = os.pathsep.join(filter(None, (os.environ.get("UNSLOTH_SITE"), os.environ.get("PYTHONPATH"))))
        command = [sys.executable, __file__, "--unsloth-process", "--out", a.out, "--reps", str(a.reps), "--cases", a.cases]
        subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False)


if __name__ == "__main__":
    main()
