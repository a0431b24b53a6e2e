"""Copies between a device and the host: on two streams of their own on CUDA devices, at once elsewhere.

Nothing here waits on the host. A copy starts when the work that was queued before it is done (an event), and what needs the copy waits
for it on the device (another event).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from .host_pool import Buffer


class Copies(Protocol):
    """What a device can do."""

    def is_recording(self) -> bool:
        """Is what this thread queues recorded, to be run later and often (a CUDA graph)."""

    def stream(self) -> Any:
        """The stream on which the device computes now, for this thread."""

    def send(self, source: Tensor, buffer: Buffer, target: Tensor) -> Any:
        """Copy device memory into a buffer once what is queued now is done; gives the event of its end."""

    def fetch(self, buffer: Buffer, source: Tensor, target: Tensor) -> Any:
        """Copy a buffer into device memory allocated just now; gives the event of its end."""

    def wait(self, stream: Any, event: Any) -> None:
        """What is queued on a stream from now on starts after an event."""

    def lend(self, tensor: Tensor, stream: Any) -> None:
        """The memory of a tensor, allocated for another stream, is read on this one."""


class PlainCopies:
    """A device without streams: every copy is done when its call returns."""

    def is_recording(self) -> bool:
        return False

    def stream(self) -> Any:
        return None

    def send(self, source: Tensor, buffer: Buffer, target: Tensor) -> Any:
        target.copy_(source)

    def fetch(self, buffer: Buffer, source: Tensor, target: Tensor) -> Any:
        target.copy_(source)

    def wait(self, stream: Any, event: Any) -> None:
        pass

    def lend(self, tensor: Tensor, stream: Any) -> None:
        pass


class CudaCopies:
    """Two streams, one each way, so that a copy out never waits for one in. The host's memory must be pinned."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.outwards = torch.cuda.Stream(device)
        self.inwards = torch.cuda.Stream(device)

    def is_recording(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)

    def send(self, source: Tensor, buffer: Buffer, target: Tensor) -> torch.cuda.Event:
        # A buffer that was free may still be read, or written to from another device: what was last in it is not needed any more.
        return self._copy(self.outwards, source, target, buffer.read, buffer.written)

    def fetch(self, buffer: Buffer, source: Tensor, target: Tensor) -> torch.cuda.Event:
        return self._copy(self.inwards, source, target, buffer.written)

    def wait(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        stream.wait_event(event)

    def lend(self, tensor: Tensor, stream: torch.cuda.Stream) -> None:
        tensor.record_stream(stream)

    def _copy(self, side: torch.cuda.Stream, source: Tensor, target: Tensor, *after: torch.cuda.Event | None) -> torch.cuda.Event:
        side.wait_event(self.stream().record_event())
        for event in after:
            if event is not None:
                side.wait_event(event)
        with torch.cuda.stream(side):
            target.copy_(source, non_blocking=True)
        return side.record_event()


def copies_of(device: torch.device) -> Copies:
    """How tensors of a device get to the host and back."""
    return CudaCopies(device) if device.type == "cuda" else PlainCopies()
