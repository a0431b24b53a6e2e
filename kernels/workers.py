"""Processes in which kernels are compiled before they are first needed, while this one goes on tracing.

``submit`` hands a kernel to a process that is free; ``finished`` waits for it, and has it taken up before others. What is compiled is
then on disk: the launch that needs it loads it from there, and compiles it itself if a process failed. A kernel that an earlier run
compiled is not handed out again.
``FXFUSE_COMPILE_PROCESSES`` says how many processes there may be; 0: none.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from fxfuse.kernels.compile_worker import Job, Pointer, assembler_version, receive, send
from fxfuse.kernels.library import cache_dir
from fxfuse.kernels.urgency import PERHAPS, SOON, UrgentFirst

log = logging.getLogger("fxfuse")

MOST_PROCESSES = 14
# Numbers that stand for all that a kernel is compiled alike for: neither 1 nor divisible by 16; divisible; wider than 32 bits.
ANY, DIVISIBLE, WIDE = 17, 16, 2**40

_pending: dict[str, Future[None]] = {}
_own = threading.local()


def count() -> int:
    """How many processes may compile: a share of the machine's cores, if several training processes run on it."""
    given = os.environ.get("FXFUSE_COMPILE_PROCESSES")
    if given is not None:
        return int(given)
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(MOST_PROCESSES, cores - 1)


def enabled() -> bool:
    """On Linux with an NVIDIA GPU."""
    suited = sys.platform == "linux" and torch.version.hip is None and not triton.knobs.runtime.interpret
    return suited and torch.cuda.is_available() and count() > 0


def start() -> None:
    """Starts the processes, if kernels can be compiled in them; they take a moment to come up. Others start as they get work."""
    if enabled():
        for _ in range(count()):
            _pool().submit(_process)


@contextmanager
def at_leisure() -> Iterator[None]:
    """What this thread hands in here is compiled after all else: candidates, of which a launch takes but one."""
    _own.urgency = PERHAPS
    try:
        yield
    finally:
        _own.urgency = SOON


def submit(jit: Any, tensors: Sequence[Tensor], numbers: Sequence[int], options: dict[str, Any], device: torch.device
           ) -> Future[None] | None:
    """Compile a jitted function, in its time; None: nothing is to be done. Tensors may lie on the meta device; then they count as
    aligned."""
    if not enabled():
        return None
    job = job_of(jit, tensors, numbers, options, target_of(device))
    key = key_of(job)
    if key not in _pending and not (_folder() / key).exists():
        _pending[key] = _pool().submit(_compile, job, key, urgency=getattr(_own, "urgency", SOON))
    return _pending.get(key)


def finished(jit: Any, tensors: Sequence[Tensor], numbers: Sequence[int], options: dict[str, Any], device: torch.device) -> None:
    """Waits for the kernel if it is being compiled. One of several candidates that threads compile side by side is handed out first:
    in processes they do not wait for one another."""
    if threading.current_thread().name.startswith("fxfuse-compile"):
        submit(jit, tensors, numbers, options, device)
    if _pending:
        future = _pending.get(key_of(job_of(jit, tensors, numbers, options, target_of(device))))
        if future is not None:
            _pool().hurry(future)
            future.result()


@cache
def target_of(device: torch.device) -> tuple[str, int, int]:
    """Triton's name for the device: backend, capability, threads of a warp."""
    major, minor = torch.cuda.get_device_capability(device)
    return "cuda", 10 * major + minor, 32


def job_of(jit: Any, tensors: Sequence[Tensor], numbers: Sequence[int], options: dict[str, Any], target: tuple[str, int, int]) -> Job:
    """The job, equal for all that are compiled alike."""
    pointers = [Pointer(str(t.dtype).removeprefix("torch."), t.is_meta or t.data_ptr() % 16 == 0) for t in tensors]
    counts = [value if parameter.is_constexpr else _standing_for(value, parameter.do_not_specialize)
              for parameter, value in zip(jit.params[len(pointers):], numbers, strict=True)]
    file = jit.fn.__code__.co_filename
    return Job((jit.__module__, file), jit.fn.__name__, (*pointers, *counts), tuple(sorted(options.items())), target)


def _standing_for(value: float, unspecialized: bool) -> float:
    if isinstance(value, float):
        return 0.5  # no kernel is specialised on one
    wide = not -(2**31) <= value < 2**31
    if unspecialized:
        return WIDE if wide else ANY
    if value == 1:
        return 1
    return (WIDE if wide else 0) + (DIVISIBLE if value % 16 == 0 else ANY)


def key_of(job: Job) -> str:
    """The name of the file that tells of a compiled kernel."""
    text = "\n".join([str(job), triton.__version__, assembler_version(job.target[1]), str(triton.knobs.cache.dir)])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@cache
def _folder() -> Path:
    folder = cache_dir() / "compiled"
    folder.mkdir(exist_ok=True)
    return folder


@cache
def _pool() -> UrgentFirst:
    """Each thread keeps a process of its own and waits for its answers."""
    return UrgentFirst(count(), "fxfuse-process")


def _process() -> subprocess.Popen[bytes]:
    """This thread's process, started if there is none."""
    process = getattr(_own, "process", None)
    if process is None or process.poll() is not None:
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        environment = os.environ | {"PYTHONPATH": paths, "TRITON_CACHE_DIR": str(triton.knobs.cache.dir), "CUDA_VISIBLE_DEVICES": ""}
        target = target_of(torch.device("cuda", 0))
        process = _own.process = subprocess.Popen(
            [sys.executable, "-m", "fxfuse.kernels.compile_worker", *map(str, target), assembler_version(target[1])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
            start_new_session=True)  # an interrupt from the keyboard is for this process; theirs end with it
    return process


def _compile(job: Job, key: str) -> None:
    """In a thread of the pool: one job, done by its process. A failure is logged; whoever needs the kernel compiles it then."""
    try:
        process = _process()
        assert process.stdin is not None
        assert process.stdout is not None
        send(process.stdin, job)
        problem = receive(process.stdout)
    except (OSError, EOFError) as error:  # the process ended: it was idle for long, or was killed
        problem = f"{type(error).__name__}: {error}"
        _own.process = None
    if problem:
        log.info("%s of %s was not compiled ahead: %s", job.function, job.module[1], problem)
    else:
        (_folder() / key).touch()
