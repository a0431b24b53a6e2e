"""Training steps as they are measured: forward, backward, optimizer; their times, memory, losses and gradient norms."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks import peers
from benchmarks.jobs import Signals
from benchmarks.workloads import Workload, batches

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
        self.tokens = workload.tokens
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


def timed(
    training: Training, args: argparse.Namespace, signals: Signals, cuda: bool
) -> dict[str, Any]:
    """Warmup steps with their gradient norms, then steps between events only."""
    losses: list[torch.Tensor] = []
    norms: list[dict[str, float]] = []
    watch = Stopwatch(cuda)
    first_step_s = 0.0
    first_peak = peak = 0  # read after each step: a contender may count anew itself, between steps
    for index in range(args.warmup):
        signals.stage(f"step {index}")
        start = time.perf_counter()
        norms.append({})
        losses.append(training.step(index, norms[-1]))
        if cuda:
            torch.cuda.synchronize()
            first_peak = max(first_peak, torch.cuda.max_memory_allocated())
        if index == 0:
            first_step_s = time.perf_counter() - start
            signals.stage(f"step 0 took {first_step_s:.1f} s")
    memory = {}
    if cuda:
        memory["first_peak_gib"] = round(first_peak / GIB, 3)
    with signals.timing():
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        for index in range(args.warmup, args.warmup + args.steps):
            with watch.step():
                losses.append(training.step(index))
            if cuda:
                peak = max(peak, torch.cuda.max_memory_allocated())
        ms = watch.ms()
    signals.stage("timed")
    if cuda:
        memory["peak_gib"] = round(peak / GIB, 3)
        memory["reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 3)
    median = statistics.median(ms)
    return dict(
        ms=round(median, 2),
        ms_min=round(min(ms), 2),
        ms_max=round(max(ms), 2),
        ms_steps=[round(value, 2) for value in ms],
        tokens_s=round(training.tokens / median * 1e3, 1),
        first_step_s=round(first_step_s, 2),
        loss0=losses[0].item(),
        grad_norm=norms[0]["all"],
        losses=[round(loss.item(), 5) for loss in losses],
        grad_norms=[n["all"] for n in norms],
        gradients=norms[0],
        trained=sum(p.numel() for p in training.parameters),
        trained_dtype=sorted({str(p.dtype).removeprefix("torch.") for p in training.parameters}),
        **memory,
    )
