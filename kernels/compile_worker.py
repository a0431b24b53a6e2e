"""A process that compiles kernels for another one: jobs come in on the standard input, answers go out on the standard output.

    python -m fxfuse.kernels.compile_worker cuda 90 32 "the assembler's version"

Compiling holds Python's lock for most of its time, so threads of the training process would stand in its way. What is compiled here
goes to Triton's cache on disk, where the other process finds it by the key that its own compiling would have. Neither torch nor CUDA
is loaded: for Triton, a driver stands in that knows the name of the target alone.

A message is its length (4 bytes) and a pickle: a ``Job`` in, an error's text ("" for none) out. The process ends with its input, or
when nothing has come for a while.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import select
import struct
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import IO, Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from fxfuse.kernels.device import exp

IDLE_SECONDS = 60


class Job(NamedTuple):
    """What Triton's dispatch would see. module: the name and file that define the ``function``. arguments: of the kernel, a number
    or a ``Pointer`` each. target: backend, capability, threads of a warp."""

    module: tuple[str, str]
    function: str
    arguments: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]
    target: tuple[str, int, int]


@dataclass(frozen=True)
class Pointer:
    """Stands for a tensor: its dtype ("bfloat16"), and whether its address is a multiple of 16."""

    dtype: str
    aligned: bool

    def data_ptr(self) -> int:
        return 0 if self.aligned else 8


class Target:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def compile_job(job: Job) -> None:
    """Puts the kernel into the cache on disk, and its C launcher where this version of Triton makes one for each signature."""
    triton.runtime.driver.set_active(Target(GPUTarget(*job.target)))
    jit = getattr(load(*job.module), job.function)
    with without_torch():
        compiled = jit.warmup(*job.arguments, grid=(1,), **dict(job.options))
    driver = import_module(f"triton.backends.{'nvidia' if job.target[0] == 'cuda' else 'amd'}.driver")
    if hasattr(driver, "make_launcher") and hasattr(driver, "CudaLauncher"):
        driver.CudaLauncher(compiled.src, compiled.metadata)


@contextmanager
def without_torch() -> Iterator[None]:
    """Triton's dispatch imports torch if it can, to know tensors by their type. There are none here, and to import it would take longer
    than all kernels of a process."""
    absent = "torch" not in sys.modules
    if absent:
        sys.modules["torch"] = None  # type: ignore[assignment]  # an import fails
    try:
        yield
    finally:
        if absent:
            del sys.modules["torch"]


@cache
def load(name: str, path: str) -> ModuleType:
    """A module of this package, or a generated one by its file."""
    if name.startswith("fxfuse."):
        return import_module(name)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@triton.jit
def _first(numbers, WIDTH: tl.constexpr):
    """A row is summed and passed through a function of the vendor's library."""
    place = numbers + tl.arange(0, WIDTH)
    row = tl.load(place)[None, :]
    tl.store(place[None, :], exp(row) * tl.sum(row, 1, keep_dims=True))


def warm_up(target: GPUTarget) -> None:
    """Compiles a kernel for nobody: the first of a process takes half a second longer than others, and there is time now."""
    triton.runtime.driver.set_active(Target(target))
    kept = triton.knobs.cache.dir
    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder
        try:
            with without_torch():
                _first.warmup(Pointer("float32", True), 256, grid=(1,))
        finally:
            triton.knobs.cache.dir = kept


def assembler_version(arch: int) -> str:
    """What Triton's keys say of the assembler, in this process from now on. (It asks once; torch's compiler may put another assembler
    in its place later, or have done so before.)"""
    nvidia = import_module("triton.backends.nvidia.compiler")
    return str(nvidia.get_ptxas_version(arch))


def use_keys_of(version: str) -> None:
    """What is compiled here is kept under the keys of a process whose ``assembler_version`` is this."""
    nvidia: Any = import_module("triton.backends.nvidia.compiler")
    nvidia.get_ptxas_version = lambda arch: version


def receive(stream: IO[bytes]) -> Any:
    """The next message; EOFError at the end."""
    header = stream.read(4)
    if len(header) < 4:
        raise EOFError
    return pickle.loads(stream.read(struct.unpack("<I", header)[0]))


def send(stream: IO[bytes], message: Any) -> None:
    text = pickle.dumps(message)
    stream.write(struct.pack("<I", len(text)) + text)
    stream.flush()


def main() -> None:
    """Answers jobs one after the other. What Triton or a compiler prints goes to the standard error output."""
    os.nice(5)  # whoever trains goes first
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    backend, capability, threads, version = sys.argv[1:]
    use_keys_of(version)
    warm_up(GPUTarget(backend, int(capability), int(threads)))
    jobs = sys.stdin.buffer
    while select.select([jobs], [], [], IDLE_SECONDS)[0]:
        try:
            job = receive(jobs)
        except EOFError:
            return
        try:
            compile_job(job)
            problem = ""
        except Exception as error:  # told to the process that asked, which compiles itself and meets it there
            problem = f"{type(error).__name__}: {error}"
        try:
            send(answers, problem)
        except BrokenPipeError:  # who asked is gone, which is nobody's failure
            return


if __name__ == "__main__":
    main()
