"""What the first kernels of a process wait for: begun as ``optimize`` begins, which waits for it as it ends.

Triton names its cached kernels by a hash of its own library, hundreds of megabytes that are read and hashed once a process: in a thread
of its own, with Python's lock passed on more often, as that thread lets go of it for each megabyte, twice, and gets it back when the
interval of whoever else runs is over. Triton compiles its driver in C, once for a cache folder. cuBLAS makes a handle for the first
matmul of a thread, which the thread leaves behind for others. And some modules are imported in the middle of a first step: by sympy in
a first comparison of sizes, by Triton, by torch for the places of its messages, by us.
"""

from __future__ import annotations

import importlib
import logging
import sys
import threading
from collections.abc import Callable

import torch
import triton

log = logging.getLogger("fxfuse")

LATE_IMPORTS = (
    "torch.export._trace",
    "torch.fx.experimental.validator",
    "sympy.tensor.tensor",
    "sympy.codegen.ast",
    "sympy.sets.setexpr",
    "fxfuse.kernels.nf4",
    "triton.experimental.gluon.language",
    "numpy.ma",
    "fxfuse.kernels.launch",
    "fxfuse.kernels.pair",
    "fxfuse.kernels.thin_ahead",
    "fxfuse.linear_loss.ahead",
)
SHORT = 5e-4  # seconds: a tenth of what Python waits for its lock
_hashing: list[threading.Thread] = []


def begin(device: torch.device) -> threading.Thread:
    """Starts. The thread ends when all is done; whoever needs a part of it sooner waits for that (``hashed``)."""
    hashing = threading.Thread(target=_attempt, args=(_hash,), name="fxfuse-hash")
    thread = threading.Thread(target=_run, args=(device, hashing), name="fxfuse-warm-up")
    _hashing.append(hashing)
    hashing.start()
    thread.start()
    return thread


def hashed() -> None:
    """Waits for the hash, where it is being made: two threads would make it twice."""
    for thread in list(_hashing):
        thread.join()
    _hashing.clear()


def _run(device: torch.device, hashing: threading.Thread) -> None:
    for module in LATE_IMPORTS:
        _attempt(importlib.import_module, module)
    _attempt(_use, device)
    hashing.join()


def _attempt(what: Callable[..., object], *given: object) -> None:
    try:
        what(*given)
    except Exception as error:  # only time is lost: what fails here fails again where it is needed, and is told there
        log.info("not warmed up: %s: %s", type(error).__name__, error)


def _use(device: torch.device) -> None:
    """The driver and the library of matmuls, once."""
    if device.type == "cuda":
        triton.runtime.driver.active.get_current_target()
    ones = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    torch.mm(ones, ones)


def _hash() -> None:
    before, short = sys.getswitchinterval(), min(sys.getswitchinterval(), SHORT)
    sys.setswitchinterval(short)
    try:
        hash_triton()
    finally:
        if sys.getswitchinterval() == short:
            sys.setswitchinterval(before)


def hash_triton() -> None:
    """Triton keeps the hash for the process (where this version of it has the function)."""
    of_triton = getattr(triton.runtime.cache, "triton_key", None)
    if of_triton is not None:
        of_triton()
