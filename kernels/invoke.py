"""Invoking one Triton kernel with fixed integer arguments: through Triton the first time, straight to its C launcher afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
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
        device = tensors[0].device
        if torch.cuda.current_device() != device.index:
            with torch.cuda.device(device):
                return self(tensors, instances)
        compiled = self.compiled
        if compiled is None:
            self.first(tensors, instances)
            return
        stream = triton.runtime.driver.active.get_current_stream(device.index)
        compiled.run(instances, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None,
                     *[t.data_ptr() for t in tensors], *self.numbers)

    def first(self, tensors: Sequence[Tensor], instances: int) -> None:
        """Through Triton's own dispatch, which compiles if need be."""
        variants = self.jit.device_caches[tensors[0].device.index][0]
        before = len(variants)
        self.compiled = self.jit[(instances,)](*tensors, *self.numbers, **self.options)
        compilations[self.jit.__module__] += len(variants) - before

    def residency(self, tensors: Sequence[Tensor]) -> int:
        """Instances that fit one multiprocessor at a time, by registers, threads and shared memory (compiles, does not launch)."""
        device = tensors[0].device
        with torch.cuda.device(device):
            compiled = self.jit.warmup(*tensors, *self.numbers, grid=(1,), **self.options)
            compiled._init_handles()
        properties = torch.cuda.get_device_properties(device)
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
