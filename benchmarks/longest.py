"""The longest sequence that a contender trains under a cap of GPU memory: one process, many lengths.

A trial is a whole step at one length; what was compiled, and the optimizer's state, are there from a short step before. The
length grows by half until a step does not fit, and is then bisected. Every trial is a row of its own, so that a run that is
ended keeps what it found; the last row has the longest. With --layers, the cap is less by what the layers left out would
hold in any case (weights, gradients, optimizer state): right where no layer keeps anything on the GPU between its
forward and its backward, which is how sequences become longest. fxfuse's share of the host's memory is less likewise, and
what it would save for the layers left out is planned for, and counted.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from benchmarks import peers
from benchmarks.jobs import Job, Signals
from benchmarks.training_steps import GIB, Training
from benchmarks.workloads import batches
from fxfuse.capture import find_installation
from fxfuse.memory.host_pool import LIMIT_VARIABLE

SHORT = 1024  # tokens of the step before all trials
GROWTH = 1.5
STEP = 256
RESOLUTION = 64  # parts of a length: within 1.6%
OPTIMIZER_STATES = 2  # of AdamW, each in the parameter's dtype
MARGIN = 0.96  # of the cap is fxfuse's budget: the allocator holds more than what is allocated
HOST_SHARE = 0.5  # of the host's memory may hold what leaves the GPU
Write = Callable[..., dict[str, Any]]


def search(job: Job, prepared: peers.Prepared, args: argparse.Namespace, signals: Signals, write: Write) -> None:
    """Rows of kind `longest`: one for each trial, then one with `longest` tokens."""
    trials = Trials(job, prepared, args.cap, signals, write)
    for length in (int(text) for text in filter(None, args.lengths.split(","))):
        trials.fits(length, repeats=2)
    if args.no_search:
        return
    longest, too_long = grow(trials.fits, args.length or job.workload.length)
    longest = bisect(trials.fits, longest, too_long)
    write(kind="longest", cap_gib=args.cap, longest=longest, ballast_gib=trials.ballast / GIB)


def grow(fits: Callable[[int], bool], length: int) -> tuple[int, int]:
    """(a length that fits or 0, a longer one that does not)."""
    longest, length = 0, _even(length)
    while fits(length):
        longest, length = length, max(_even(length * GROWTH), length + STEP)
    return longest, length


def bisect(fits: Callable[[int], bool], longest: int, too_long: int) -> int:
    """The longest that fits, between one that does and one that does not."""
    while too_long - longest > max(STEP, too_long // RESOLUTION):
        middle = _even((longest + too_long) / 2)
        longest, too_long = (middle, too_long) if fits(middle) else (longest, middle)
    return longest


def _even(length: float) -> int:
    """Lengths are multiples of STEP, as a loader that pads would make them."""
    return max(STEP, int(length) // STEP * STEP)


class Trials:
    """Steps of one model at many lengths, under a cap of bytes."""

    def __init__(self, job: Job, prepared: peers.Prepared, cap_gib: float, signals: Signals, write: Write) -> None:
        self.job, self.prepared, self.signals, self.write = job, prepared, signals, write
        self.cap_gib = cap_gib
        self.left_out = 0  # bytes that layers left out would keep, in a plan of fxfuse
        self.ballast = missing_layers(prepared.model, job.workload.layers, type(job).full_layers(job.workload.name))
        self.cap = int(cap_gib * GIB) - self.ballast
        self.cuda = next(prepared.model.parameters()).is_cuda
        if self.cuda:
            torch.cuda.set_per_process_memory_fraction(self.cap / torch.cuda.get_device_properties(0).total_memory)
        if job.contender.base == "fxfuse":
            if self.ballast:
                os.environ[LIMIT_VARIABLE] = f"{HOST_SHARE * job.workload.layers / type(job).full_layers(job.workload.name):.6f}"
            self._optimize()
        self.training = Training(prepared, job.workload, "cuda" if self.cuda else "cpu")
        self._short_step()

    def _short_step(self) -> None:
        """After it there is a plan to make, and what was compiled is found again."""
        self._step(min(SHORT, self.job.workload.length))

    def _optimize(self) -> None:
        """fxfuse with the cap as its budget, unless the contender names another."""
        import fxfuse

        budget = self.job.contender.budgets[0] if self.job.contender.budgets else int(self.cap * MARGIN)
        model = fxfuse.restore(self.prepared.model)
        self.prepared.model = fxfuse.optimize(model, memory=budget, **self.job.contender.arguments)
        if self.ballast:
            self.governor = find_installation(self.prepared.model).governor
            problem = self.governor.problem
            self.governor.problem = lambda *args, **kwargs: self._of_all_layers(problem(*args, **kwargs))

    def _of_all_layers(self, problem: Any) -> Any:
        """The planner's problem with the least that the layers left out would keep between forward and backward."""
        missing = type(self.job).full_layers(self.job.workload.name) - self.job.workload.layers
        self.left_out = missing * min(point.saved_bytes for point in problem.groups[-1].block.points)
        problem.outside.static["saved by layers left out"] = self.left_out
        return problem

    def fits(self, length: int, repeats: int = 1) -> bool:
        """Whether a step at this length runs; its row is written. Of several steps the last is timed."""
        self.signals.stage(f"a sequence of {length}")
        columns: dict[str, Any] = dict(kind="longest", cap_gib=self.cap_gib, length=length, ballast_gib=self.ballast / GIB)
        try:
            for _ in range(repeats):
                columns |= self._step(length)
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            columns["failed"] = f"{type(error).__name__}: {lines[0][:300]}"
        self.write(**columns)
        if "failed" not in columns:
            return True
        self._recover()
        return False

    def _step(self, length: int) -> dict[str, Any]:
        """Columns of one step of whole batches of this length. MemoryError where a CPU keeps more than the cap."""
        workload = replace(self.job.workload, length=length)
        self.training.batches = batches(workload, "cuda" if self.cuda else "cpu", count=1)
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            self._saves_at_most_the_cap()
        start = time.perf_counter()
        loss = self.training.step(0).item()
        ms = (time.perf_counter() - start) * 1e3
        found = dict(ms=round(ms, 1), us_a_token=round(ms * 1e3 / workload.tokens, 3), loss=loss)
        found["host_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, 2)
        if self.cuda:
            found["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 3)
            found["left_out_gib"] = round(self.left_out / GIB, 3)
            if torch.cuda.max_memory_allocated() + self.left_out > self.cap:
                raise MemoryError(f"{found} is more than {self.cap / GIB:.2f} GiB with the layers left out")
            found["reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 3)
        return found

    def _saves_at_most_the_cap(self) -> None:
        from fxfuse.training import saved_for_backward

        kept = saved_for_backward(self.training.model, self.training.batches[0])
        if kept > self.cap:
            raise MemoryError(f"{kept} bytes are kept for the backward, more than {self.cap}")

    def _recover(self) -> None:
        """What a failed step left is freed, and fxfuse is installed anew: it may have failed half way."""
        self.training.optimizer.zero_grad(set_to_none=True)
        if self.job.contender.base == "fxfuse":
            self._optimize()
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
        if self.job.contender.base == "fxfuse":
            self._short_step()


def missing_layers(model: torch.nn.Module, layers: int, full: int) -> int:
    """Bytes that the layers of the whole model hold which this one is cut by."""
    if not layers or layers >= full:
        return 0
    return (full - layers) * standing_bytes(next(iter(peers.decoder_layers(model))))


def standing_bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's weights, quantization state, gradients and optimizer state."""
    held = sum(_bytes(module.parameters())) + sum(_bytes(module.buffers()))
    for parameter in module.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            held += sum(_bytes(tensor for tensor in state.as_dict(packed=False).values() if torch.is_tensor(tensor)))
    trained = sum(_bytes(parameter for parameter in module.parameters() if parameter.requires_grad))
    return held + trained * (1 + OPTIMIZER_STATES)


def _bytes(tensors: Iterable[torch.Tensor]) -> Iterable[int]:
    return (tensor.numel() * tensor.element_size() for tensor in tensors)
