"""One kernel on tensors of one layout: its text, grid and arguments, and the second stage of its sums over rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from fxfuse import reference
from fxfuse.kernels import abilities, configuration, library
from fxfuse.kernels.abilities import NONE, Abilities
from fxfuse.kernels.catalogue import emit, next_power_of_2, schedule_for, tiles_of
from fxfuse.kernels.configuration import Config
from fxfuse.kernels.direct import Form, Made, Stage, compose, names_of
from fxfuse.kernels.invoke import Kernel
from fxfuse.kernels.layout import Layout
from fxfuse.kernels.source import stride_names, summed_outputs
from fxfuse.program import Program

# The second stage of sums over rows: columns of an instance, and the partial sums of each that it loads at once: all there are.
FINISH_COLUMNS, FINISH_PARTS = 16, 512


@dataclass(frozen=True)
class Variant:
    """A kernel text with its integer arguments and compile options: what one layout and one configuration make of a program."""

    source: str
    numbers: tuple[int, ...]
    options: dict[str, Any]
    tiles: int
    across: int


def variant(program: Program, kind: str, layout: Layout, config: Config, able: Abilities = NONE) -> Variant:
    """``tiles``: tiles of rows; ``across``: blocks of columns that a row is cut into."""
    blocks = configuration.blocks_of(kind, config, dict(layout.widths))
    schedule = schedule_for(program, layout, kind, config, blocks, able)
    strides = [layout.columns[k] if d == "c" else layout.strides[k][int(d)] for _, k, d in stride_names(program, schedule)]
    sizes = [layout.rows, *layout.sizes[1:]] if schedule.rank else []
    widths = [dict(layout.widths)[axis] for axis, _ in program.axes]
    numbers = (*strides, *sizes, *widths, *[blocks[axis] for axis, _ in program.axes], config.rows, config.stages,
               *([able.early] if summed_outputs(program) else []))
    across = triton.cdiv(layout.widths[0][1], blocks[layout.widths[0][0]]) if kind == "tiled" else 1
    options: dict[str, Any] = {"num_warps": config.warps}
    if config.most_registers and able.pairs:
        options["maxnreg"] = config.most_registers
    if any(node.op == "check_index" for node in program.nodes):
        # An index out of range traps on the device, as eager's kernels do; integer overflow is left unchecked.
        options |= {"debug": True, "sanitize_overflow": False}
    return Variant(emit(program, schedule), numbers, options, tiles_of(schedule, layout, config.rows), across)


class Launch:
    """One kernel, its grid and its integer arguments, for tensors of one layout."""

    def __init__(self, program: Program, kind: str, layout: Layout, config: Config, outputs: Sequence[Tensor],
                 device: torch.device | None = None) -> None:
        """``device``: where it will run, if the outputs are mere forms (on the meta device)."""
        self.kind, self.layout, self.config, self.device = kind, layout, config, device or outputs[0].device
        self.able = abilities.of_device(self.device)
        self.program, self.variant = program, variant(program, kind, layout, config, self.able)
        self.forms = [Form(tuple(t.shape), t.stride(), t.dtype) for t in outputs]
        self.kept = [k for k, output in enumerate(program.outputs) if not output.sums_rows]
        self.summed = [k for k, output in enumerate(program.outputs) if output.sums_rows]
        self.math = reference.torch_dtype(program.math)
        module = library.load(self.variant.source)
        self.kernel = Kernel(module.kernel, self.variant.numbers, self.variant.options)
        self.instances = self.variant.tiles * self.variant.across
        self.sums = partial(Finish, program, getattr(module, "finish", None), dict(layout.widths), self.able.early)
        self.finish: Finish | None = None

    def load(self, tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> OutOfResources | None:
        """Compiles and loads the kernel; returns what the device has too little of. Outputs that are mere forms will be new memory."""
        partials = [torch.empty(0, dtype=self.math, device=self.device)] if self.summed else []
        kept = [torch.empty(0, dtype=outputs[k].dtype, device=self.device) if outputs[k].is_meta else outputs[k] for k in self.kept]
        try:
            self.kernel.load([*tensors, *kept, *partials])
        except OutOfResources as lacking:
            return lacking
        return None

    def compile_ahead(self, tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Has the kernels compiled elsewhere. How many instances a multiprocessor holds is not known before: as asked for, or fewer."""
        forms = [torch.empty(0, dtype=self.math, device="meta")] if self.summed else []
        self.kernel.compile_ahead([*tensors, *[outputs[k] for k in self.kept], *forms], self.device)
        if self.summed:
            for most in {next_power_of_2(self.parts_of(held)) for held in range(1, self.config.per_unit + 1)}:
                self.sums(most, most).kernel.compile_ahead([*forms, *[outputs[k] for k in self.summed]], self.device)

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

    def direct(self, tensors: Sequence[Tensor], given: Sequence[Tensor | None] | None, places: Sequence[int | None] | None,
               guarded: bool) -> Callable[..., list[Tensor]] | None:
        """The same launch, once it has run, as a generated function of the tensors (and of those outputs that are ``given``)."""
        arguments = names_of(0, len(tensors))
        free = iter(names_of(1, len(self.forms)))
        made, outputs = [], []
        for k, form in enumerate(self.forms):
            place = None if places is None else places[k]
            if given is not None and given[k] is not None:
                outputs.append(next(free))
            else:
                made.append(Made(f"o{k}", form, "" if place is None else arguments[place]))
                outputs.append(f"o{k}")
        stages = [Stage(self.kernel, self.instances, (*arguments, *outputs))]
        if self.finish is not None:
            form = Form((self.finish.parts, self.finish.columns), (self.finish.columns, 1), self.finish.dtype)
            made.append(Made("partials", form))
            stages = [Stage(self.kernel, self.finish.parts * self.variant.across,
                            (*arguments, *[outputs[k] for k in self.kept], "partials")),
                      Stage(self.finish.kernel, self.finish.instances, ("partials", *[outputs[k] for k in self.summed]))]
        groups = [tensors] if given is None else [tensors, [t for t in given if t is not None]]
        return compose(groups, made, stages, f"[{', '.join(outputs)}]", guarded)

    def most_parts(self, tensors: Sequence[Tensor]) -> int:
        """How many persistent instances can share the rows: as many as the device holds at once, up to the configuration's number,
        and no more than the second stage loads at once."""
        on_device = self.device.type == "cuda"
        return self.parts_of(min(self.config.per_unit, self.kernel.residency(tensors)) if on_device else self.config.per_unit)

    def parts_of(self, resident: int) -> int:
        """The same, with so many on each multiprocessor."""
        units = 2
        if self.device.type == "cuda":
            units = torch.cuda.get_device_properties(self.device).multi_processor_count
        return max(1, min(FINISH_PARTS, triton.cdiv(units * resident, self.variant.across)))


class Finish:
    """The second stage of sums over rows: adds up the ``parts`` partial sums of all summed outputs."""

    def __init__(self, program: Program, jit: Any, widths: dict[str, int], early: bool, most: int, parts: int) -> None:
        """``most``: parts that there can be, whatever the number of rows, so that the kernel does not depend on it."""
        columns = [widths.get(o.columns or "", 1) if not isinstance(o.columns, int) else o.columns for o in summed_outputs(program)]
        self.parts, self.columns, self.dtype = parts, sum(columns), reference.torch_dtype(program.math)
        self.instances = triton.cdiv(self.columns, FINISH_COLUMNS)
        at_once = next_power_of_2(most)
        numbers = (parts, *[widths[axis] for axis, _ in program.axes], at_once, FINISH_COLUMNS, early)
        options = {"num_warps": max(1, min(8, at_once * FINISH_COLUMNS // 1024))}
        self.kernel = Kernel(jit, numbers, options | ({"launch_pdl": True} if early else {}))

    def buffer(self, device: torch.device) -> Tensor:
        return torch.empty_strided((self.parts, self.columns), (self.columns, 1), dtype=self.dtype, device=device)

    def __call__(self, partials: Tensor, outputs: Sequence[Tensor]) -> None:
        self.kernel([partials, *outputs], self.instances)
