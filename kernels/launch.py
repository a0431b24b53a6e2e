"""Running row programs: tensors in, tensors out.

``prepare(program)`` gives a callable that keeps, for each combination of shapes, strides and alignments it has seen, everything a
launch needs (compiled kernel, grid, integer arguments, output shapes); a repeated call is a dictionary lookup, the allocation of the
outputs and the launch itself. It takes CUDA tensors, and CPU tensors under Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from fxfuse import reference
from fxfuse.emit import Schedule
from fxfuse.errors import EmissionError
from fxfuse.kernels import configuration, library, tuning
from fxfuse.kernels.catalogue import choose_kind, emit, schedule_for
from fxfuse.kernels.configuration import Config
from fxfuse.kernels.layout import Layout, flattened, layout_of
from fxfuse.kernels.source import stride_names, summed_outputs
from fxfuse.kernels.splitting import PartialSum, Split, split_sums, without_partial_sums
from fxfuse.program import Program

INTERPRETED = bool(triton.knobs.runtime.interpret)
# Called with the program of every launch of the kernels of a program.
listeners: list[Callable[[Program], None]] = []
# Compilations by generated kernel file, counted at the first launch of each variant.
compilations: Counter[str] = Counter()
FINISH_PARTS, FINISH_COLUMNS = 32, 64


def run(program: Program, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of a program; see ``prepare``."""
    return prepare(program)(tensors)


@lru_cache(maxsize=4096)
def prepare(program: Program) -> Prepared:
    """The launcher of a program, one for the whole process."""
    return Prepared(program)


class Prepared:
    """A program ready to run. ``kind`` and ``config`` pin the schedule (tests and benchmarks); None: chosen by launch."""

    def __init__(self, program: Program, kind: str | None = None, config: Config | None = None) -> None:
        self.program = program
        self.unsummed, self.sums = without_partial_sums(program)
        self.kind, self.config = kind, config
        self.launches: dict[tuple, Callable[[Sequence[Tensor], Sequence[Tensor] | None], list[Tensor]]] = {}

    def __call__(self, tensors: Sequence[Tensor], outputs: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Runs the program into new tensors, or into ``outputs`` (laid out as ``reference.allocate`` would).

        ``outputs`` may share memory with arguments that have no other lanes or rows read after the store: whoever passes them
        answers for that.
        """
        key = tuple([(t.shape, t.stride(), t.dtype, t.device, t.data_ptr() & 15) for t in tensors])
        if outputs is not None:
            key = (*key, *[(t.stride(), t.data_ptr() & 15) for t in outputs])
        launch = self.launches.get(key)
        if launch is None:
            launch = self.launches[key] = self.specialize(tensors, outputs)
        if listeners:
            for listener in listeners:
                listener(self.program)
        results = launch(tensors, outputs)
        return self._summed(results) if self.sums else results

    def _summed(self, results: list[Tensor]) -> list[Tensor]:
        for rest in self.sums:
            results[rest.index] = _sum_rows(results[rest.index], rest)
        return results

    def specialize(self, tensors: Sequence[Tensor], outputs: Sequence[Tensor] | None
                   ) -> Callable[[Sequence[Tensor], Sequence[Tensor] | None], list[Tensor]]:
        """Everything that follows from shapes and strides alone."""
        check_arguments(self.program, tensors)
        program = self.unsummed
        widths = reference.axis_widths(program, tensors)
        leading = reference.domain_shape(program, tensors)
        if 0 in leading or 0 in widths.values():
            return lambda tensors, outputs: _nothing(program, tensors, outputs)
        kind = self.kind or choose_kind(program, widths)
        if kind is None:
            return SplitLaunch(split_sums(program))
        if outputs is None or self.sums:
            outputs = [reference.allocate(program, output, tensors) for output in program.outputs]
        views = [reference.aligned(program, a, t) for a, t in zip(program.arguments, tensors, strict=True)]
        layout = layout_of(program, views, outputs, widths, leading)
        if kind == "tiled":
            layout = flattened(program, layout) or layout
        if summed_outputs(program) and not layout.sizes:
            layout = Layout((1,), tuple((0,) for _ in layout.strides), layout.columns, layout.widths)
        moved = sum(t.numel() for t in (*tensors, *outputs))
        config = self.config or tuning.choose(
            program, kind, layout, tensors[0].device, moved,
            lambda trial: tuning.time_on_device(lambda: Launch(program, kind, layout, trial, outputs)(tensors, None)))
        return Launch(program, kind, layout, config, outputs)


def check_arguments(program: Program, tensors: Sequence[Tensor]) -> None:
    """Raises EmissionError unless the tensors are what the program declares, on one device that Triton can reach."""
    widths: dict[str, int] = {}
    if len(tensors) != len(program.arguments):
        raise EmissionError(f"{len(program.arguments)} tensors are needed, {len(tensors)} were given")
    for argument, tensor in zip(program.arguments, tensors, strict=True):
        where = f"argument {argument.name} : {tensor.dtype} {tuple(tensor.shape)}"
        if tensor.dtype != reference.torch_dtype(argument.dtype):
            raise EmissionError(f"{where} is declared {argument}; cast it before the call")
        if tensor.device != tensors[0].device or tensor.device.type != ("cpu" if INTERPRETED else "cuda"):
            raise EmissionError(f"{where} is on {tensor.device}; kernels need every tensor on one GPU "
                                "(on the CPU run fxfuse.reference.execute, or set TRITON_INTERPRET=1)")
        if tensor.dim() > program.rank + 1:
            raise EmissionError(f"{where} has more dimensions than the program (rank {program.rank} and columns)")
        columns = tensor.shape[-1] if tensor.dim() else 1
        expected = argument.columns if isinstance(argument.columns, int) else 1
        if isinstance(argument.columns, str):
            expected = widths.setdefault(argument.columns, program.width(argument.columns) or columns)
        if columns != expected:
            raise EmissionError(f"{where}: the last dimension must be {expected}, as {argument} says")
        shape = (1,) * (program.rank + 1 - tensor.dim()) + tuple(tensor.shape[:-1])
        if any(size != 1 and not varies for size, varies in zip(shape, argument.rows, strict=True)):
            raise EmissionError(f"{where} varies over a dimension that {argument} broadcasts")


def _sum_rows(full: Tensor, rest: PartialSum) -> Tensor:
    return full.sum(rest.dims, keepdim=True).to(reference.torch_dtype(rest.dtype))


def _nothing(program: Program, tensors: Sequence[Tensor], outputs: Sequence[Tensor] | None) -> list[Tensor]:
    """A domain without elements: what the reference makes of it (empty outputs, sums that are 0)."""
    results = reference.execute(program, tensors)
    if outputs is None:
        return results
    return [output.copy_(result) for output, result in zip(outputs, results, strict=True)]


class SplitLaunch:
    """Two programs in place of one: rows and statistics, then the sums that need them."""

    def __init__(self, split: Split) -> None:
        self.split, self.rows, self.sums = split, prepare(split.rows), prepare(split.sums)
        self.kept = sum(1 for part, _ in split.order if part == 0)

    def __call__(self, tensors: Sequence[Tensor], outputs: Sequence[Tensor] | None) -> list[Tensor]:
        rows = self.rows(tensors)
        sums = self.sums([*tensors, *rows[self.kept:]])
        results = [(rows, sums)[part][k] for part, k in self.split.order]
        if outputs is None:
            return results
        return [output.copy_(result) for output, result in zip(outputs, results, strict=True)]


@dataclass(frozen=True)
class Form:
    """What ``torch.empty_strided`` needs to make an output again."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class Launch:
    """One kernel, its grid and its integer arguments, for tensors of one layout."""

    def __init__(self, program: Program, kind: str, layout: Layout, config: Config, outputs: Sequence[Tensor]) -> None:
        widths = dict(layout.widths)
        blocks = configuration.blocks_of(kind, config, widths)
        self.schedule = schedule_for(program, layout, kind, config.rows, blocks)
        self.source = emit(program, self.schedule)
        module = library.load(self.source)
        self.kernel, self.name = module.kernel, module.__name__
        self.config, self.device = config, outputs[0].device
        self.forms = [Form(tuple(t.shape), t.stride(), t.dtype) for t in outputs]
        self.kept = [k for k, output in enumerate(program.outputs) if not output.sums_rows]
        self.summed = [k for k, output in enumerate(program.outputs) if output.sums_rows]
        self.instances, parts = _grid(kind, layout, config, blocks, bool(self.summed), self.device)
        self.numbers = _numbers(program, self.schedule, layout, blocks, config)
        self.options = {"num_warps": config.warps}
        if any(node.op == "check_index" for node in program.nodes):
            # An index out of range traps on the device, as eager's kernels do; integer overflow is left unchecked.
            self.options |= {"debug": True, "sanitize_overflow": False}
        self.compiled: Any = None
        if self.summed:
            self.finish = Finish(program, module.finish, widths, parts)

    def __call__(self, tensors: Sequence[Tensor], outputs: Sequence[Tensor] | None) -> list[Tensor]:
        if outputs is None:
            device = self.device
            outputs = [torch.empty_strided(f.shape, f.strides, dtype=f.dtype, device=device) for f in self.forms]
        if not self.summed:
            self.launch([*tensors, *outputs])
        else:
            partials = self.finish.buffer(self.device)
            self.launch([*tensors, *[outputs[k] for k in self.kept], partials])
            self.finish(partials, [outputs[k] for k in self.summed])
        return outputs if isinstance(outputs, list) else list(outputs)

    def launch(self, tensors: Sequence[Tensor]) -> None:
        if self.compiled is None:
            self.compiled = _first_launch(self.kernel, self.name, self.instances, (*tensors, *self.numbers), self.options)
        else:
            _launch(self.compiled, self.instances, [t.data_ptr() for t in tensors], self.numbers, self.device)


class Finish:
    """The second stage of sums over rows: adds up the partial sums of all summed outputs."""

    def __init__(self, program: Program, kernel: Any, widths: dict[str, int], parts: int) -> None:
        self.kernel, self.parts = kernel, parts
        columns = [widths.get(o.columns, 1) if not isinstance(o.columns, int) else o.columns for o in summed_outputs(program)]
        self.shape = (parts, sum(columns))
        self.dtype = reference.torch_dtype(program.math)
        self.instances = triton.cdiv(max(columns), FINISH_COLUMNS)
        self.numbers = (parts, *[widths[axis] for axis, _ in program.axes], FINISH_PARTS, FINISH_COLUMNS)
        self.compiled: Any = None

    def buffer(self, device: torch.device) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=device)

    def __call__(self, partials: Tensor, outputs: Sequence[Tensor]) -> None:
        tensors = [partials, *outputs]
        if self.compiled is None:
            self.compiled = _first_launch(self.kernel, self.kernel.__module__, self.instances, (*tensors, *self.numbers),
                                          {"num_warps": 4})
        else:
            _launch(self.compiled, self.instances, [t.data_ptr() for t in tensors], self.numbers, partials.device)


def _first_launch(kernel: Any, name: str, instances: int, arguments: tuple, options: dict[str, Any]) -> Any:
    """Launches through Triton, which compiles if need be; returns the compiled kernel (None in the interpreter)."""
    if INTERPRETED:
        _interpret(kernel, instances, arguments, options)
        return None
    before = _compiled_variants(kernel, arguments[0].device)
    with torch.cuda.device(arguments[0].device):
        compiled = kernel[(instances,)](*arguments, **options)
    compilations[name] += _compiled_variants(kernel, arguments[0].device) - before
    return compiled


def _compiled_variants(kernel: Any, device: torch.device) -> int:
    return len(kernel.device_caches[device.index][0])


def _interpret(kernel: Any, instances: int, arguments: tuple, options: dict[str, Any]) -> None:
    """Runs a kernel in Triton's interpreter; a failed device assertion is an IndexError, as on the CPU in eager."""
    try:
        kernel[(instances,)](*arguments, **options)
    except Exception as error:
        if isinstance(error.__cause__, AssertionError) and "index out of range" in str(error):
            raise IndexError(f"Target is out of bounds: {error.__cause__}") from error
        raise


def _launch(compiled: Any, instances: int, pointers: list[int], numbers: tuple, device: torch.device) -> None:
    """Launches a compiled kernel on the current stream of the tensors' device, past Triton's dispatch."""
    if torch.cuda.current_device() != device.index:
        with torch.cuda.device(device):
            return _launch(compiled, instances, pointers, numbers, device)
    stream = triton.runtime.driver.active.get_current_stream(device.index)
    compiled.run(instances, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *pointers, *numbers)
    return None


@lru_cache(maxsize=None)
def _multiprocessors(device: torch.device) -> int:
    # In the interpreter: enough instances that the second stage has something to add.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _grid(kind: str, layout: Layout, config: Config, blocks: dict[str, int], sums: bool, device: torch.device) -> tuple[int, int]:
    """The number of program instances, and of rows of partial sums."""
    tiles = triton.cdiv(layout.rows, config.rows)
    across = 1
    if kind == "tiled":
        (axis, width), = layout.widths
        across = triton.cdiv(width, blocks[axis])
    if not sums:
        return tiles * across, 0
    persistent = _multiprocessors(device) * config.per_unit
    parts = min(tiles, max(1, triton.cdiv(persistent, across)))
    return parts * across, parts


def _numbers(program: Program, schedule: Schedule, layout: Layout, blocks: dict[str, int], config: Config) -> tuple[int, ...]:
    """Integer arguments in the order of ``source.parameters``."""
    strides = [layout.columns[k] if d == "c" else layout.strides[k][int(d)] for _, k, d in stride_names(program, schedule)]
    sizes = [layout.rows, *layout.sizes[1:]] if schedule.rank else []
    widths = [dict(layout.widths)[axis] for axis, _ in program.axes]
    return (*strides, *sizes, *widths, *[blocks[axis] for axis, _ in program.axes], config.rows, config.stages)
