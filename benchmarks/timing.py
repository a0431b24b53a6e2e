"""Timing on one GPU: medians of CUDA graph replays over rotating inputs, so that neither launches nor the L2 count.

On a CPU (`--dry`) each closure runs once under a clock: the logic is exercised, the number means nothing.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

os.environ.setdefault("FXFUSE_TUNING_PATIENCE", "inf")  # kernels are timed as they are once every candidate has been tried

L2_BYTES = 60 * 2**20  # H200; inputs rotate over at least three times this
Closure = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call."""

    ms: float
    ms_min: float
    ms_max: float
    how: str


def sets_for(bytes_of_one: int, most: int = 64) -> int:
    """How many input sets keep the L2 from holding what the next call reads."""
    return max(2, min(most, -(-3 * L2_BYTES // max(1, bytes_of_one))))


def _replays(run: Closure, calls: int, reps: int, warm: int) -> list[float]:
    for _ in range(warm):
        run()
    torch.cuda.synchronize()
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(reps)
    ]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / calls for start, end in events]


def _graph_of(closures: Sequence[Closure]) -> torch.cuda.CUDAGraph:
    """One CUDA graph that runs each closure once, in order."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for closure in closures:
            closure()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for closure in closures:
            closure()
    return graph


def measure(closures: Sequence[Closure], reps: int = 15, graph: bool = True) -> Timing:
    """Median, least and most milliseconds of one closure."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        closures[0]()
        ms = (time.perf_counter() - start) * 1e3
        return Timing(ms, ms, ms, "cpu")
    for closure in closures:
        closure()
    torch.cuda.synchronize()
    how = "graph"
    if graph:
        try:
            times = _replays(_graph_of(closures).replay, len(closures), reps, 3)
            return Timing(statistics.median(times), min(times), max(times), how)
        except (
            RuntimeError
        ) as error:  # a peer that synchronizes cannot be captured: time it with its launches
            torch.cuda.synchronize()
            how = f"events ({type(error).__name__})"
    times = _replays(lambda: [closure() for closure in closures], len(closures), reps, 2)
    return Timing(statistics.median(times), min(times), max(times), how if how != "graph" else "events")


def copy_closures(nbytes: int, device: str) -> list[Closure]:
    """Copies that move `nbytes` each (read plus written), over rotating buffers. For small ones in a graph see `pass_closures`."""
    half = max(64, nbytes // 2)
    pairs = [
        (
            torch.randint(0, 127, (half,), device=device, dtype=torch.uint8),
            torch.empty(half, device=device, dtype=torch.uint8),
        )
        for _ in range(sets_for(2 * half, most=48))
    ]
    return [partial(sink.copy_, source) for source, sink in pairs]


def pass_closures(nbytes: int, device: str) -> list[Closure]:
    """One kernel that reads half of `nbytes` and writes as much: what a copy is where launches must not count (in a graph)."""
    count = max(8, nbytes // 2 // 4)
    pairs = [
        (torch.randint(0, 127, (count,), device=device, dtype=torch.int32), torch.empty(count, device=device, dtype=torch.int32))
        for _ in range(sets_for(8 * count, most=48))
    ]
    return [partial(torch.bitwise_not, source, out=sink) for source, sink in pairs]


def passes_ms(device: str, *sizes: int) -> float:
    """Milliseconds of one such kernel for each of these numbers of bytes, one after the other: what the memory allows at this size."""
    closures = [pass_closures(nbytes, device) for nbytes in sizes if nbytes]
    count = max(map(len, closures))
    return measure([partial(_each, [some[i % len(some)] for some in closures]) for i in range(count)]).ms


def _each(closures: Sequence[Closure]) -> None:
    for closure in closures:
        closure()


def copy_bandwidth(device: str, nbytes: int = 4 * 2**30) -> float:
    """Bytes per second, read plus written, of a large device copy: the ceiling of a memory-bound kernel."""
    if device == "cpu":
        nbytes = 2**20
    timing = measure(copy_closures(nbytes, device), graph=False)  # in a graph, a copy runs on the slower copy engine
    return nbytes / (timing.ms * 1e-3)
