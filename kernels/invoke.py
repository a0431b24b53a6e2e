"""Invoking one Triton kernel with fixed integer arguments: compiled and loaded once, then straight to its C launcher."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from fxfuse.kernels import ahead, warm_up, workers

INTERPRETED = bool(triton.knobs.runtime.interpret)
# The index of the current device, without the checks of torch.cuda.current_device; kernels take tensors that are on one already.
current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
# The handle of the device's current stream. (Triton's own function, which it finds through its driver, where torch has none.)
current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", lambda index: triton.runtime.driver.active.get_current_stream(index))
# Variants that Triton compiled, by generated file: sequence lengths must not add to them.
compilations: Counter[str] = Counter()


class Kernel:
    """A jitted function, its arguments after the tensors, and its compile options. Tensors must keep their alignment from call to
    call (``launch`` keys on it): the compiled code is specialised on it."""

    def __init__(self, jit: Any, numbers: tuple[int, ...], options: dict[str, Any]) -> None:
        self.jit, self.numbers, self.options = jit, numbers, options
        self.compiled: Any = None

    def __call__(self, tensors: Sequence[Tensor], instances: int) -> None:
        """Launches on the current stream of the tensors' device."""
        if INTERPRETED:
            self.interpret(tensors, instances)
            return
        index = tensors[0].get_device()
        if current_device() != index:
            with torch.cuda.device(index):
                return self(tensors, instances)
        compiled = self.compiled
        if compiled is None:
            compiled = self.load(tensors)
        compiled.run(instances, 1, 1, current_stream(index), compiled.function, compiled.packed_metadata, None, None, None,
                     *[t.data_ptr() for t in tensors], *self.numbers)

    def load(self, tensors: Sequence[Tensor]) -> Any:
        """Compiles if need be, and loads onto the device, without a launch. Raises Triton's OutOfResources where it does not fit."""
        if INTERPRETED or self.compiled is not None:
            return self.compiled
        device = ahead.announced_on()
        if device is not None:
            return self.compile_ahead(tensors, device)
        workers.finished(self.jit, tensors, self.numbers, self.options, tensors[0].device)
        warm_up.hashed()
        with torch.cuda.device(tensors[0].device):
            variants = self.jit.device_caches[tensors[0].get_device()][0]
            before = len(variants)
            compiled = self.jit.warmup(*tensors, *self.numbers, grid=(1,), **self.options)
            compilations[self.jit.__module__] += len(variants) - before
            compiled._init_handles()
        self.compiled = compiled
        return compiled

    def compile_ahead(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        """Has it compiled for such tensors (which may be mere forms) in another process, for the ``load`` to come."""
        ahead.announce(workers.submit(self.jit, tensors, self.numbers, self.options, device))

    def residency(self, tensors: Sequence[Tensor]) -> int:
        """Instances that fit one multiprocessor at a time, by registers, threads and shared memory."""
        compiled = self.load(tensors)
        properties = torch.cuda.get_device_properties(tensors[0].device)
        threads = self.options["num_warps"] * properties.warp_size
        registers = threads * max(32, (compiled.n_regs + 7) // 8 * 8)
        shared = compiled.metadata.shared + 1024
        return max(1, min(properties.regs_per_multiprocessor // registers,
                          properties.max_threads_per_multi_processor // threads,
                          properties.shared_memory_per_multiprocessor // shared))

    def interpret(self, tensors: Sequence[Tensor], instances: int) -> None:
        """In Triton's interpreter. A failed device assertion is an IndexError, as in eager on the CPU."""
        builder = triton.runtime.interpreter.interpreter_builder
        builder.options = replace(builder.options, debug=self.options.get("debug", False), sanitize_overflow=False)
        try:
            self.jit[(instances,)](*tensors, *self.numbers, **self.options)
        except triton.runtime.interpreter.InterpreterError as error:
            if isinstance(error.__cause__, AssertionError):
                raise IndexError(f"Target is out of bounds: {error.__cause__}") from error
            raise
