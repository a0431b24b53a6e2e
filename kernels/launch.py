"""Running row programs: tensors in, tensors out.

``prepare(program)`` gives a callable that keeps, for each combination of shapes, strides and alignments it has seen, everything a
launch needs (compiled kernel, grid, integer arguments, output shapes); a repeated call is a dictionary lookup, the allocation of the
outputs and the launch itself. It takes CUDA tensors, and CPU tensors under Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from fxfuse import reference
from fxfuse.errors import EmissionError
from fxfuse.kernels import configuration, library, tuning
from fxfuse.kernels.arguments import check_arguments
from fxfuse.kernels.catalogue import choose_kind, emit, has_reductions, next_power_of_2, schedule_for, tiles_of
from fxfuse.kernels.configuration import Config
from fxfuse.kernels.early_sums import with_early_sums
from fxfuse.kernels.invoke import INTERPRETED, Kernel
from fxfuse.kernels.layout import Layout, flattened, layout_of
from fxfuse.kernels.source import stride_names, summed_outputs
from fxfuse.kernels.splitting import PartialSum, Split, split_sums, without_partial_sums
from fxfuse.program import Program

# Called with the program of every launch of the kernels of a program.
listeners: list[Callable[[Program], None]] = []
# The second stage of sums over rows: columns of an instance, and partial sums of them that it loads at once, at most.
FINISH_COLUMNS, FINISH_PARTS = 16, 512
# Layouts that a program keeps ready: lengths that change at every step must not pile up.
MOST_LAUNCHES = 1024

log = logging.getLogger("fxfuse")


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
        self.unsummed, self.sums = without_partial_sums(with_early_sums(program))
        self.kind, self.config = kind, config
        self.launches: dict[tuple, Callable[[Sequence[Tensor], Sequence[Tensor] | None], list[Tensor]]] = {}

    def __call__(self, tensors: Sequence[Tensor], outputs: Sequence[Tensor | None] | None = None,
                 reuse: Sequence[int | None] | None = None) -> list[Tensor]:
        """Runs the program into new tensors, or into those of ``outputs`` that are not None (of the shapes and dtypes that
        ``reference.allocate`` would give; strides are free), or into the operands that ``reuse`` names, one for each output.

        What is written may share memory with arguments that have no other lanes or rows read after the store: whoever passes it
        answers for that.
        """
        if reuse is not None:
            outputs = self.places(tensors, reuse)
        if outputs is not None:
            outputs = [reference.allocate(self.program, form, tensors) if output is None else output
                       for form, output in zip(self.program.outputs, outputs, strict=True)]
        key = (tensors[0].get_device(), *[(t.shape, t.stride(), t.dtype, t.data_ptr() & 15) for t in tensors])
        if outputs is not None:
            key = (*key, *[(t.stride(), t.data_ptr() & 15) for t in outputs])
        launch = self.launches.get(key)
        if launch is None:
            if len(self.launches) >= MOST_LAUNCHES:
                self.launches.clear()
            launch = self.launches[key] = self.specialize(tensors, outputs)
        if listeners:
            for listener in listeners:
                listener(self.program)
        results = launch(tensors, outputs)
        return self._summed(results) if self.sums else results

    def places(self, tensors: Sequence[Tensor], reuse: Sequence[int | None]) -> list[Tensor | None] | None:
        """The operands in whose memory outputs are stored, where they lie as the outputs would, and each is read but once."""
        widths = reference.axis_widths(self.program, tensors)
        kind = self.kind or choose_kind(self.unsummed, widths)
        if kind in (None, "looped"):
            return None
        forms = [reference.allocate(self.program, output, tensors) for output in self.program.outputs]
        return [tensors[i] if i is not None and tensors[i].shape == form.shape and tensors[i].stride() == form.stride()
                and tensors[i].dtype == form.dtype else None for form, i in zip(forms, reuse, strict=True)]

    def _summed(self, results: list[Tensor]) -> list[Tensor]:
        for rest in self.sums:
            results[rest.index] = _sum_rows(results[rest.index], rest)
        return results

    def specialize(self, tensors: Sequence[Tensor], outputs: Sequence[Tensor] | None
                   ) -> Callable[[Sequence[Tensor], Sequence[Tensor] | None], list[Tensor]]:
        """Everything that follows from shapes and strides alone."""
        check_arguments(self.program, tensors)
        if tensors[0].device.type != ("cpu" if INTERPRETED else "cuda"):
            raise EmissionError(f"the tensors are on {tensors[0].device}; kernels need a GPU (on the CPU run "
                                "fxfuse.reference.execute, or set TRITON_INTERPRET=1)")
        program = self.unsummed
        widths, leading = reference.axis_widths(program, tensors), reference.domain_shape(program, tensors)
        if 0 in leading or 0 in widths.values():
            return lambda tensors, outputs: _nothing(program, tensors, outputs)
        kind = self.kind or choose_kind(program, widths)
        if kind is None:
            return SplitLaunch(split_sums(program))
        if outputs is None or self.sums:
            outputs = [reference.allocate(program, output, tensors) for output in program.outputs]
        return self.fitting(kind, tensors, outputs)

    def fitting(self, kind: str, tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> Callable[..., list[Tensor]]:
        """A launch that the device has room for: the chosen configuration, or the largest below it that fits."""
        program, device = self.unsummed, tensors[0].device
        layout = plan(program, kind, tensors, outputs)

        def ready(trial: Config) -> Callable[[], object] | None:
            launch = Launch(program, kind, layout, trial, outputs)
            return partial(launch, tensors, None) if launch.load(tensors, outputs) is None else None

        moved = sum(t.numel() for t in (*tensors, *outputs))
        config = self.config or tuning.choose(program, kind, layout, device, moved, ready)
        while True:
            launch = Launch(program, kind, layout, config, outputs)
            lacking = launch.load(tensors, outputs)
            if lacking is None:
                return launch
            less = configuration.smaller(config, lacking.name)
            log.info("%s: %s; trying %s", config, lacking, less)
            if less is None:
                return self.cut(kind, lacking, tensors, outputs)
            config = less
            tuning.settle(program, kind, layout, device, config)

    def cut(self, kind: str, lacking: OutOfResources, tensors: Sequence[Tensor], outputs: Sequence[Tensor]
            ) -> Callable[..., list[Tensor]]:
        """Whole rows do not fit in any configuration: rows in blocks."""
        if kind != "rows" or not has_reductions(self.unsummed):
            raise EmissionError(f"a kernel does not fit {tensors[0].device} in any configuration: {lacking}") from lacking
        if summed_outputs(self.unsummed):
            return SplitLaunch(split_sums(self.unsummed))
        return self.fitting("looped", tensors, outputs)


def plan(program: Program, kind: str, tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> Layout:
    """How a launch under a schedule sees its tensors; sizes and strides alone matter."""
    views = [reference.aligned(program, a, t) for a, t in zip(program.arguments, tensors, strict=True)]
    layout = layout_of(program, views, outputs, reference.axis_widths(program, tensors), reference.domain_shape(program, tensors))
    if kind == "tiled":
        layout = flattened(program, layout) or layout
    if summed_outputs(program) and not layout.sizes:
        layout = Layout((1,), tuple((0,) for _ in layout.strides), layout.columns, layout.widths)
    return layout


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


@dataclass(frozen=True)
class Variant:
    """A kernel text with its integer arguments and compile options: what one layout and one configuration make of a program."""

    source: str
    numbers: tuple[int, ...]
    options: dict[str, Any]
    tiles: int
    across: int


def starts_early(device: torch.device) -> bool:
    """Whether a kernel can be set up while the one before it still runs."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def variant(program: Program, kind: str, layout: Layout, config: Config, early: bool = False) -> Variant:
    """``tiles``: tiles of rows; ``across``: blocks of columns that a row is cut into; ``early``: see ``starts_early``."""
    blocks = configuration.blocks_of(kind, config, dict(layout.widths))
    schedule = schedule_for(program, layout, kind, config, blocks)
    strides = [layout.columns[k] if d == "c" else layout.strides[k][int(d)] for _, k, d in stride_names(program, schedule)]
    sizes = [layout.rows, *layout.sizes[1:]] if schedule.rank else []
    widths = [dict(layout.widths)[axis] for axis, _ in program.axes]
    numbers = (*strides, *sizes, *widths, *[blocks[axis] for axis, _ in program.axes], config.rows, config.stages,
               *([early] if summed_outputs(program) else []))
    across = triton.cdiv(layout.widths[0][1], blocks[layout.widths[0][0]]) if kind == "tiled" else 1
    options: dict[str, Any] = {"num_warps": config.warps}
    if any(node.op == "check_index" for node in program.nodes):
        # An index out of range traps on the device, as eager's kernels do; integer overflow is left unchecked.
        options |= {"debug": True, "sanitize_overflow": False}
    return Variant(emit(program, schedule), numbers, options, tiles_of(schedule, layout, config.rows), across)


class Launch:
    """One kernel, its grid and its integer arguments, for tensors of one layout."""

    def __init__(self, program: Program, kind: str, layout: Layout, config: Config, outputs: Sequence[Tensor]) -> None:
        self.kind, self.layout, self.config, self.device = kind, layout, config, outputs[0].device
        self.early = starts_early(self.device)
        self.program, self.variant = program, variant(program, kind, layout, config, self.early)
        self.forms = [Form(tuple(t.shape), t.stride(), t.dtype) for t in outputs]
        self.kept = [k for k, output in enumerate(program.outputs) if not output.sums_rows]
        self.summed = [k for k, output in enumerate(program.outputs) if output.sums_rows]
        self.math = reference.torch_dtype(program.math)
        module = library.load(self.variant.source)
        self.kernel = Kernel(module.kernel, self.variant.numbers, self.variant.options)
        self.instances = self.variant.tiles * self.variant.across
        self.sums = partial(Finish, program, getattr(module, "finish", None), dict(layout.widths), self.early)
        self.finish: Finish | None = None

    def load(self, tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> OutOfResources | None:
        """Compiles and loads the kernel; returns what the device has too little of."""
        partials = [torch.empty(0, dtype=self.math, device=self.device)] if self.summed else []
        try:
            self.kernel.load([*tensors, *[outputs[k] for k in self.kept], *partials])
        except OutOfResources as lacking:
            return lacking
        return None

    def __call__(self, tensors: Sequence[Tensor], outputs: Sequence[Tensor] | None) -> list[Tensor]:
        if outputs is None:
            device = self.device
            outputs = [torch.empty_strided(f.shape, f.strides, dtype=f.dtype, device=device) for f in self.forms]
        if not self.summed:
            self.kernel([*tensors, *outputs], self.instances)
        else:
            kept = [outputs[k] for k in self.kept]
            if self.finish is None:
                most = self.most_parts([*tensors, *kept, torch.empty(0, dtype=self.math, device=self.device)])
                self.finish = self.sums(most, min(self.variant.tiles, most))
            partials = self.finish.buffer(self.device)
            self.kernel([*tensors, *kept, partials], self.finish.parts * self.variant.across)
            self.finish(partials, [outputs[k] for k in self.summed])
        return outputs if isinstance(outputs, list) else list(outputs)

    def most_parts(self, tensors: Sequence[Tensor]) -> int:
        """How many persistent instances share the rows: as many as the device holds at once, up to the configuration's number;
        those without rows to do are left out."""
        units, resident = 2, self.config.per_unit
        if self.device.type == "cuda":
            units = torch.cuda.get_device_properties(self.device).multi_processor_count
            resident = min(resident, self.kernel.residency(tensors))
        return max(1, triton.cdiv(units * resident, self.variant.across))


class Finish:
    """The second stage of sums over rows: adds up the ``parts`` partial sums of all summed outputs."""

    def __init__(self, program: Program, jit: Any, widths: dict[str, int], early: bool, most: int, parts: int) -> None:
        """``most``: parts that there can be, whatever the number of rows, so that the kernel does not depend on it."""
        columns = [widths.get(o.columns or "", 1) if not isinstance(o.columns, int) else o.columns for o in summed_outputs(program)]
        self.parts, self.columns, self.dtype = parts, sum(columns), reference.torch_dtype(program.math)
        self.instances = triton.cdiv(self.columns, FINISH_COLUMNS)
        at_once = min(next_power_of_2(most), FINISH_PARTS)
        numbers = (parts, *[widths[axis] for axis, _ in program.axes], at_once, FINISH_COLUMNS, early)
        options = {"num_warps": max(1, min(8, at_once * FINISH_COLUMNS // 1024))}
        self.kernel = Kernel(jit, numbers, options | ({"launch_pdl": True} if early else {}))

    def buffer(self, device: torch.device) -> Tensor:
        return torch.empty_strided((self.parts, self.columns), (self.columns, 1), dtype=self.dtype, device=device)

    def __call__(self, partials: Tensor, outputs: Sequence[Tensor]) -> None:
        self.kernel([partials, *outputs], self.instances)
