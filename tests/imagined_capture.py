"""CUDA graphs as they are, imagined on a CPU: fixed addresses, outputs overwritten by each replay, and freed memory used again.

What a recording computes and does not return lies, on a device, in memory that recordings made later may own. The worst that can come
of it is done here: a replay first fills with NaN whatever later recordings own.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fxfuse import aot
from fxfuse.cuda_graphs import checkpoints, recorder
from fxfuse.cuda_graphs.fitness import why_unfit
from fxfuse.cuda_graphs.pool import Pool

NAN_BYTE = 0xFF  # all bits set: NaN as a number, -1 as an integer


class ImaginedCapture:
    """Keeps no tensor alive that a CUDA graph would not keep."""

    def __init__(self) -> None:
        self.made: list[list[weakref.ref]] = []
        self.busy = ""
        self.free = 1 << 40
        self.device_seconds: float | None = 0.0  # what the device takes for whatever is timed

    def why_not_now(self) -> str:
        return self.busy

    def owns(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu"

    def free_bytes(self) -> int:
        return self.free

    def watch(self) -> Callable[[], Callable[[], float | None]]:
        return lambda: lambda: self.device_seconds

    def __call__(self, run: Callable[[list], Any], inputs: list) -> tuple[list, Callable[[], None]]:
        addresses = [unowned(i) if isinstance(i, Tensor) else i for i in inputs]
        outputs = list(run(list(inputs)))
        given = {i.untyped_storage().data_ptr() for i in inputs if isinstance(i, Tensor)}
        own = [o for o in outputs if isinstance(o, Tensor) and o.untyped_storage().data_ptr() not in given]
        for tensor in own:
            spoil(tensor)  # nothing has been computed yet
        number = len(self.made)
        self.made.append([weakref.ref(tensor.untyped_storage()) for tensor in own])
        targets = [unowned(o) if isinstance(o, Tensor) else o for o in outputs]

        def replay() -> None:
            for storages in self.made[number + 1 :]:
                for storage in storages:
                    if storage() is not None:
                        ctypes.memset(storage().data_ptr(), NAN_BYTE, storage().nbytes())
            for target, result in zip(targets, run(list(addresses)), strict=True):
                if isinstance(target, Tensor) and target.data_ptr() != result.data_ptr():
                    target.copy_(result)

        return outputs, replay


def unowned(tensor: Tensor) -> Tensor:
    """A tensor at the same address that does not keep the memory."""
    storage = tensor.untyped_storage()
    if not storage.nbytes():
        return tensor
    memory = torch.frombuffer((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr()), dtype=torch.uint8)
    return torch.empty(0, dtype=tensor.dtype).set_(memory.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def spoil(tensor: Tensor) -> None:
    """Fill a tensor's memory with what is no number."""
    ctypes.memset(tensor.untyped_storage().data_ptr(), NAN_BYTE, tensor.untyped_storage().nbytes())


@contextmanager
def imagined(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    """Blocks on the CPU are recorded, into this pool."""
    pool = Pool(ImaginedCapture())
    with monkeypatch.context() as patch:
        patch.setattr(recorder, "device_index", lambda arguments: 0)
        patch.setattr(recorder, "pool_of", lambda index: pool)
        patch.setattr(checkpoints, "RECORDED", True)
        patch.setattr(aot, "why_unfit", partial(why_unfit, device_type="cpu"))
        yield pool
