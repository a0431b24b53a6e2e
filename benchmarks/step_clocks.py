"""Clocks in the functions through which a first step goes: forward, backward, optimizer; and Dynamo, our backend, AOTAutograd, kernels.

They cost nothing to speak of. Stages nest: what is indented is part of what stands above it, at the places that are named (a kernel is
loaded in the forward or in the backward, something is imported anywhere).
"""

from __future__ import annotations

import gc
import threading
import time
from collections import Counter
from collections.abc import Callable
from importlib import _bootstrap, import_module  # type: ignore[attr-defined]  # what an import statement calls for a new module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.training_steps import Training

# (clock, module, function): where it is called from, under its name there
CLOCKED = (
    ("Dynamo, and what it calls", "torch._dynamo.convert_frame", "_compile"),
    ("  tracing", "torch._dynamo.convert_frame", "trace_frame"),
    ("  guards", "torch._dynamo.convert_frame", "CheckFunctionManager"),
    ("backend", "fxfuse.backend", "Backend.__call__"),
    ("  rewriting", "fxfuse.backend", "rewrite_graph"),
    ("    names", "fxfuse.rewriting", "name_of"),
    ("    rehearsal", "fxfuse.rewriting", "_rehearse"),
    ("    verdicts", "fxfuse.validation", "judged"),
    ("    verdicts of losses", "fxfuse.linear_loss.checking", "judged"),
    ("  AOTAutograd and after", "fxfuse.backend", "compile_eager"),
    ("    metadata", "torch._functorch.aot_autograd", "create_aot_state"),
    ("      taken from an earlier run", "fxfuse.earlier_traces.seam", "read"),
    ("    joint graph", "torch._functorch._aot_autograd.graph_compile", "aot_dispatch_autograd_graph"),
    ("    partition", "fxfuse.aot", "partition"),
    ("    products", "fxfuse.aot", "arrange_products"),
    ("    bufferize", "fxfuse.aot", "bufferize"),
    ("      announced", "fxfuse.bufferize", "compile_launches_ahead"),
    ("kernels loaded", "fxfuse.kernels.invoke", "Kernel.load"),
    ("  waiting for processes", "fxfuse.kernels.workers", "finished"),
    ("candidates chosen", "fxfuse.kernels.tuning", "_best"),
    ("  timed", "fxfuse.kernels.tuning", "times_on_device"),
    ("memory on the host", "fxfuse.memory.offload_runtime", "host_memory"),
)
FORWARD, BACKWARD, OPTIMIZER, WAITED = "forward", "backward", "optimizer", "waiting for the device"
IMPORTS, GARBAGE = "imports", "garbage collected"
ORDER = (FORWARD, BACKWARD, OPTIMIZER, WAITED, *(label for label, _, _ in CLOCKED), IMPORTS, GARBAGE)


class Clocks:
    """Seconds in functions of the threads that run the model (a backward has its own), and how often they were called."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.imported: Counter[str] = Counter()  # seconds, by what was asked for first
        self._importing = threading.local()
        for label, module, path in CLOCKED:
            owner: Any = import_module(module)
            *outer, name = path.split(".")
            for part in outer:
                owner = getattr(owner, part)
            setattr(owner, name, self.clocked(label, getattr(owner, name)))
        find_and_load = _bootstrap._find_and_load
        _bootstrap._find_and_load = lambda name, importer: self._import(find_and_load, name, importer)
        gc.callbacks.append(self._collection)

    def of_steps(self, training: Training) -> None:
        """The parts of a training step."""
        training.model = self.clocked(FORWARD, training.model)  # type: ignore[assignment]
        training.optimizer.step = self.clocked(OPTIMIZER, training.optimizer.step)  # type: ignore[method-assign]
        tensor: Any = import_module("torch").Tensor
        tensor.backward = self.clocked(BACKWARD, tensor.backward)

    def clocked(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **named: Any) -> Any:
            if threading.current_thread().name.startswith("fxfuse-"):
                return function(*args, **named)  # beside the step
            start = time.perf_counter()
            try:
                return function(*args, **named)
            finally:
                self.seconds[label] += time.perf_counter() - start
                self.calls[label] += 1

        return run

    def _import(self, find_and_load: Callable[..., Any], name: str, importer: Any) -> Any:
        if getattr(self._importing, "now", False):
            return find_and_load(name, importer)
        self._importing.now, start = True, time.perf_counter()
        try:
            return self.clocked(IMPORTS, find_and_load)(name, importer)
        finally:
            self._importing.now = False
            self.imported[name] += time.perf_counter() - start

    def _collection(self, phase: str, _: Any) -> None:
        now = time.perf_counter()
        self.seconds[GARBAGE] += now if phase == "stop" else -now
        self.calls[GARBAGE] += phase == "stop"

    def rows(self) -> list[tuple[str, float, int]]:
        return [(label, self.seconds[label], self.calls[label]) for label in ORDER if self.calls[label]]

    def text(self) -> str:
        lines = [f"{seconds:8.2f} s  {calls:5d} calls  {label}" for label, seconds, calls in self.rows()]
        slow = ", ".join(f"{name} {seconds:.3f}" for name, seconds in self.imported.most_common(12) if seconds > 0.002)
        return "\n".join([*lines, f"imported in the step (seconds): {slow or 'nothing'}"]) + "\n"
