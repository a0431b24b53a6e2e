"""How fast tensors get to the host and back, measured once on a device; what computation hides of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from .._torch import disable_current_modes

_MEASURED = 64 << 20  # bytes of one copy
_REPEATS = 4
# Copies share the memory of host and device with the computation beside them, and do not start the moment that they could.
_HIDEABLE = 0.85


@dataclass(frozen=True)
class Rates:
    """Bytes a second to the host (``out``) and back. measured: on this device; else what a PCIe 5 x16 link gives."""

    out: float = 50e9
    back: float = 50e9
    measured: bool = False

    def ms(self, count: int) -> float:
        """Milliseconds that the slower of the two copies of ``count`` bytes takes."""
        return count / min(self.out, self.back) * 1e3

    def hidden_bytes(self, compute_ms: float) -> int:
        """Bytes whose copies end while the device computes for so long.

        With the time of a block's forward, which is shorter than its backward, this is what the block may send without anybody waiting.
        """
        return int(_HIDEABLE * compute_ms * 1e-3 * min(self.out, self.back))

    def exposed_ms(self, count: int, forward_ms: float, backward_ms: float) -> float:
        """Milliseconds that a block loses to copies of ``count`` bytes out during a forward and back during a backward."""
        out, back = count / self.out * 1e3, count / self.back * 1e3
        return max(out - _HIDEABLE * forward_ms, 0.0) + max(back - _HIDEABLE * backward_ms, 0.0)


@cache
def rates(device: torch.device) -> Rates:
    """The rates of a device: measured, some 15 ms, when first asked; assumed for devices that are not CUDA devices."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return Rates()
    with disable_current_modes(), torch.no_grad(), torch.cuda.device(device):
        near = torch.empty(_MEASURED, dtype=torch.uint8, device=device)
        far = torch.empty(_MEASURED, dtype=torch.uint8, device="cpu", pin_memory=True)
        return Rates(_rate(near, far), _rate(far, near), measured=True)


def _rate(source: torch.Tensor, target: torch.Tensor) -> float:
    """Bytes a second of copies on a stream of their own, after one that does not count."""
    stream = torch.cuda.Stream()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        target.copy_(source, non_blocking=True)
        start.record(stream)
        for _ in range(_REPEATS):
            target.copy_(source, non_blocking=True)
        end.record(stream)
    end.synchronize()
    return _REPEATS * source.numel() / (start.elapsed_time(end) * 1e-3)
