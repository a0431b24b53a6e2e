"""What the first kernels of a process wait for and Python's lock does not: begun in ``optimize``, done when the first step asks for it.

Triton names its cached kernels by a hash of its own library, hundreds of megabytes that are read and hashed once a process, and
compiles its driver in C, once for a cache folder. cuBLAS makes a handle for the first matmul of a thread, which the thread leaves
behind for others. sympy imports some of its modules in the middle of a first comparison of sizes.
"""

from __future__ import annotations

import importlib
import logging
import threading

import torch
import triton

log = logging.getLogger("fxfuse")

LATE_IMPORTS = ("sympy.tensor.tensor", "sympy.physics.units", "sympy.codegen.ast", "sympy.sets.setexpr")


def begin(device: torch.device) -> threading.Thread:
    """Starts; nothing waits for the thread, but the process does not end before it."""
    thread = threading.Thread(target=_run, args=(device,), name="fxfuse-warm-up")
    thread.start()
    return thread


def _run(device: torch.device) -> None:
    try:
        for module in LATE_IMPORTS:
            importlib.import_module(module)
        hash_triton()
        if device.type == "cuda":
            triton.runtime.driver.active.get_current_target()
        ones = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
        torch.mm(ones, ones)
    except Exception as error:  # only time is lost: what fails here fails again where it is needed, and is told there
        log.info("nothing was warmed up: %s: %s", type(error).__name__, error)


def hash_triton() -> None:
    """Triton keeps the hash for the process (where this version of it has the function)."""
    of_triton = getattr(triton.runtime.cache, "triton_key", None)
    if of_triton is not None:
        of_triton()
