"""What makes a CUDA graph of a callable: torch's own recorder, into memory of our own pool."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch

from .. import _torch
from ..capture.collector import collector_paused

Run = Callable[[list], Any]
Elapsed = Callable[[], float | None]


class Capture(Protocol):
    """Records what a callable launches. Recordings of one Capture may share memory once a value is no longer referred to."""

    def why_not_now(self) -> str:
        """Why neither recording nor replay is possible at this moment, or nothing."""
        ...

    def owns(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is on the device that is recorded."""
        ...

    def free_bytes(self) -> int:
        """What is free of the device's memory."""
        ...

    def watch(self) -> Callable[[], Elapsed]:
        """Starts a watch of the device. Stopped, it gives the seconds that the device took, once that is known."""
        ...

    def __call__(self, run: Run, inputs: list) -> tuple[list, Callable[[], None]]:
        """``run(inputs)`` recorded, not run: its outputs, which hold no values yet, and what runs it."""
        ...


class CudaCapture:
    """CUDA graphs on one device."""

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)
        self.handle = torch.cuda.graph_pool_handle()
        self.recording_stream = torch.cuda.Stream(self.device)
        self.stream = torch.cuda.current_stream(self.device)
        self._keeper = torch.cuda.CUDAGraph()  # while there is a graph, the allocator keeps the pool
        with warnings.catch_warnings(record=True):  # it is empty
            self._record(self._keeper, list, [])

    def why_not_now(self) -> str:
        if torch.cuda.current_stream(self.device) != self.stream:
            return "another stream was current than when the first block was recorded"
        if torch.cuda.is_current_stream_capturing():
            return "a CUDA graph around it was being recorded"
        return ""

    def owns(self, tensor: torch.Tensor) -> bool:
        return tensor.device == self.device

    def free_bytes(self) -> int:
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + unused

    def watch(self) -> Callable[[], Elapsed]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(self.stream)

        def stop() -> Elapsed:
            end.record(self.stream)
            return lambda: start.elapsed_time(end) / 1e3 if end.query() else None

        return stop

    def __call__(self, run: Run, inputs: list) -> tuple[list, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        return self._record(graph, run, inputs), graph.replay

    def _record(self, graph: torch.cuda.CUDAGraph, run: Run, inputs: list) -> list:
        # A workspace that cuBLAS keeps would be memory of the pool that outlives this recording without anybody knowing.
        _torch.clear_cublas_workspaces()
        try:
            with (
                collector_paused(),
                torch.cuda.device(self.device),
                torch.cuda.graph(graph, pool=self.handle, stream=self.recording_stream, capture_error_mode="thread_local"),
            ):
                return list(run(inputs))
        finally:
            _torch.clear_cublas_workspaces()  # (builds without CUDA do not have it)
