"""The longest sequence that a contender trains under a cap of GPU memory: one process, many lengths.

A trial is a whole step at one length; what was compiled, and the optimizer's state, are there from a short step before. fxfuse is
installed anew for each, so that a trial is what somebody's first batch of this length would be: nothing was measured, and
all that is tuned, compared and compiled at the length happens inside of it. The length grows by half until a step does not
fit, and is then bisected; at the longest another two steps run, of which the last is timed. Every trial is a row of its own,
so that a run that is ended keeps what it found; the last row has the longest. With --layers, the cap is less by what the
layers left out would hold in any case (weights, gradients, optimizer state); fxfuse's share of the host's memory is less
likewise (FXFUSE_HOST_MEMORY, a fraction, is that of the whole model), and so is its budget by what it would keep on the GPU
between forward and backward for the layers left out, at the point that keeps least. That counts against the cap too.
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
from fxfuse.capture.governor import Governor
from fxfuse.kernels import room
from fxfuse.memory.host_pool import LIMIT_VARIABLE
from fxfuse.memory.plan import Point

SHORT = 1024  # tokens of the step before all trials
GROWTH = 1.5
STEP = 256
RESOLUTION = 64  # parts of a length: within 1.6%
OPTIMIZER_STATES = 2  # of AdamW, each in the parameter's dtype
MARGIN = 0.96  # of the cap is fxfuse's budget: the allocator holds more than what is allocated
HOST_SHARE = 0.5  # of the host's memory may hold what leaves the GPU, unless FXFUSE_HOST_MEMORY says another fraction
Write = Callable[..., dict[str, Any]]


def search(job: Job, prepared: peers.Prepared, args: argparse.Namespace, signals: Signals, write: Write) -> None:
    """Rows of kind `longest`: one for each trial, then one with `longest` tokens."""
    trials = Trials(job, prepared, args.cap, signals, write)
    tried = {length: trials.fits(length, repeats=2) for length in map(int, filter(None, args.lengths.split(",")))}
    if args.no_search:
        return
    timed = [length for length, fits in tried.items() if fits]
    longest, too_long = between(trials.fits, args.length or job.workload.length, tried)
    longest = bisect(trials.fits, longest, too_long)
    if longest and longest not in timed:
        trials.fits(longest, repeats=2)
    write(kind="longest", cap_gib=args.cap, longest=longest, ballast_gib=trials.ballast / GIB)


def between(fits: Callable[[int], bool], length: int, tried: dict[int, bool]) -> tuple[int, int]:
    """(a length that fits, a longer one that does not): two that were tried, else found by growing from the longest that fitted."""
    longest = max((length for length, fitted in tried.items() if fitted), default=0)
    too_long = min((length for length, fitted in tried.items() if length > longest and not fitted), default=0)
    return (longest, too_long) if longest and too_long else grow(fits, length, longest)


def grow(fits: Callable[[int], bool], length: int, longest: int = 0) -> tuple[int, int]:
    """(a length that fits, ``longest`` if none is known that is longer, a longer one that does not)."""
    length = max(_even(length), longest + STEP)
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
        self.cuda = any(p.is_cuda for p in prepared.model.parameters())  # Unsloth keeps embeddings on the host
        if self.cuda:
            torch.cuda.set_per_process_memory_fraction(self.cap / torch.cuda.get_device_properties(0).total_memory)
        self.governor: Governor | None = None
        self.host_share: float | None = None
        if job.contender.base == "fxfuse":
            if self.ballast:
                self.host_share = float(os.environ.get(LIMIT_VARIABLE) or HOST_SHARE)
                os.environ[LIMIT_VARIABLE] = f"{self.host_share * job.workload.layers / type(job).full_layers(job.workload.name):.6f}"
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
        self.governor = find_installation(self.prepared.model).governor
        if self.ballast:
            self._leave_room(self.governor)

    def _leave_room(self, governor: Governor) -> None:
        """The budget of a step is less by what the layers left out would keep on the GPU between forward and backward."""
        limit = governor._limit

        def less(readings: Any) -> tuple[int, int]:
            budget, margin = limit(readings)
            self.left_out = self._kept_by_layers_left_out(governor)
            if self.left_out >= budget - margin:
                raise MemoryError(f"the layers left out alone would keep {self.left_out / GIB:.2f} of {budget / GIB:.2f} GiB")
            room.limit(governor.device, budget - self.left_out, id(governor))
            return budget - self.left_out, margin

        governor._limit = less  # type: ignore[method-assign]

    def _kept_by_layers_left_out(self, governor: Governor) -> int:
        """Bytes, at the point that keeps least in all: what their share of the host's memory would not hold is among it."""
        layers, full = self.job.workload.layers, type(self.job).full_layers(self.job.workload.name)
        problem = governor.problem(governor.shape) if governor.shape else None
        if problem is None or not problem.groups:
            return 0
        return least_beside_host(full - layers, problem.groups[-1].block.points, problem.host, layers)

    def fits(self, length: int, repeats: int = 1) -> bool:
        """Whether a step at this length runs; its row is written. Of several steps the last is timed."""
        self.signals.stage(f"a sequence of {length}")
        columns: dict[str, Any] = dict(kind="longest", cap_gib=self.cap_gib, length=length, ballast_gib=self.ballast / GIB)
        try:
            if self.governor is not None:
                self._optimize()
                self._short_step()
            for _ in range(repeats):
                columns |= self._step(length)
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            columns["failed"] = f"{type(error).__name__}: {lines[0][:300]}"
            columns |= self._planned()
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
        found |= self._planned()
        found["host_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, 2)
        if self.cuda:
            found["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 3)
            if torch.cuda.max_memory_allocated() + self.left_out > self.cap:
                raise MemoryError(f"{found} is more than {self.cap / GIB:.2f} GiB with the layers left out")
            found["reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 3)
        return found

    def _planned(self) -> dict[str, Any]:
        """What fxfuse planned, if it did, and for which batch."""
        plan = None if self.governor is None else self.governor.plan
        if self.governor is None or plan is None:
            return {}
        return dict(predicted_gib=round(plan.predicted_peak / GIB, 3), points=dict(plan.points()), planned=str(self.governor.planned),
                    left_out_gib=round(self.left_out / GIB, 3), host_share=self.host_share)

    def _saves_at_most_the_cap(self) -> None:
        from fxfuse.training import saved_for_backward

        kept = saved_for_backward(self.training.model, self.training.batches[0])
        if kept > self.cap:
            raise MemoryError(f"{kept} bytes are kept for the backward, more than {self.cap}")

    def _recover(self) -> None:
        """What a failed step left is freed."""
        self.training.optimizer.zero_grad(set_to_none=True)
        if self.governor is not None:
            self._optimize()  # it may have failed half way
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()


def least_beside_host(missing: int, points: Iterable[Point], share: int | None, layers: int) -> int:
    """Bytes that so many layers keep on the GPU, at the one of these points at which that is least."""
    return min(kept_beside_host(missing, point, share, layers) for point in points)


def kept_beside_host(missing: int, point: Point, share: int | None, layers: int) -> int:
    """Bytes that so many layers keep on the GPU at a point. share: bytes of the host's memory for ``layers`` others; None: no limit."""
    beyond = 0 if share is None else point.offloaded_bytes - share // layers
    return missing * (point.saved_bytes + max(beyond, 0))


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
