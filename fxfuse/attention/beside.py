"""Compiling kernels in a process beside the training, which only fills the folder where their compiler keeps them.

Neither Dynamo nor Inductor may run in two threads of one process, and Python that lowers a graph would hold up the thread that trains.
The process ends with its work. It holds a device context of its own for that time (half a GiB).
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import torch

from .flex import compiled

# Device memory that has to be free.
NEEDED_BYTES = 2 << 30


class Beside:
    """One process, and what it compiles: each request by ``compile``, a function of a module (FlexAttention's is the default)."""

    def __init__(self, requests: Sequence[Any], compile: Callable[[Any], Any] = compiled) -> None:
        self.requests = list(requests)
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        # One thread compiles: the cores are for the training.
        environment = os.environ | {"PYTHONPATH": paths, "TORCHINDUCTOR_COMPILE_THREADS": "1", "FXFUSE_COMPILE_PROCESSES": "0"}
        self.process = subprocess.Popen([sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, env=environment,
                                        start_new_session=True)  # an interrupt from the keyboard is for this process
        atexit.register(self.process.terminate)
        assert self.process.stdin is not None
        with self.process.stdin as pipe:
            pickle.dump((_settings(), compile.__module__, compile.__name__, self.requests), pipe)

    def done(self) -> bool:
        return self.process.poll() is not None

    def problems(self) -> list[str]:
        """For each kernel why it was not compiled, or nothing; to be asked when it is done."""
        atexit.unregister(self.process.terminate)
        assert self.process.stdout is not None
        with self.process.stdout as pipe:
            said = pipe.read()
        try:
            return json.loads(said)
        except ValueError:
            return [f"its process ended with {self.process.returncode}"] * len(self.requests)


def has_room(device: torch.device) -> bool:
    return torch.cuda.mem_get_info(device)[0] >= NEEDED_BYTES


def _settings() -> str:
    """What Inductor's key of a kernel depends on and code often sets. (Where other settings differ, kernels are compiled once more.)"""
    return torch.backends.cuda.matmul.fp32_precision


def serve(given: BinaryIO, answer: BinaryIO) -> None:
    """In the process: compile what is asked for, and say how it went."""
    settings, module, name, requests = pickle.load(given)
    compile = getattr(importlib.import_module(module), name)
    torch.backends.cuda.matmul.fp32_precision = settings
    answer.write(json.dumps([_problem(request, compile) for request in requests]).encode())
    answer.flush()


def _problem(request: Any, compile: Callable[[Any], Any]) -> str:
    try:
        compile(request)
    except Exception as error:  # compilers fail in many ways, and there is always another kernel
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return ""


if __name__ == "__main__":
    os.nice(10)
    own = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    serve(sys.stdin.buffer, own)
