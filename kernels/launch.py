"""Running row programs: tensors in, tensors out.

``prepare(program)`` gives a callable that keeps, for each combination of shapes, strides and alignments it has seen, everything a
launch needs (compiled kernel, grid, integer arguments, output shapes); a repeated call is a dictionary lookup, the allocation of the
outputs and the launch itself. It takes CUDA tensors, and CPU tensors under Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from fxfuse import reference
from fxfuse.dataflow import Dataflow
from fxfuse.errors import EmissionError
from fxfuse.kernels import ahead, configuration, tuning, workers
from fxfuse.kernels.arguments import check_arguments
from fxfuse.kernels.catalogue import choose_kind, has_reductions
from fxfuse.kernels.configuration import Config
from fxfuse.kernels.early_sums import with_early_sums
from fxfuse.kernels.invoke import INTERPRETED
from fxfuse.kernels.joined_sums import with_joined_sums
from fxfuse.kernels.layout import Layout, flattened, layout_of
from fxfuse.kernels.single import Launch
from fxfuse.kernels.source import summed_outputs
from fxfuse.kernels.splitting import PartialSum, Split, split_sums, without_partial_sums
from fxfuse.program import Program

# Called with the program of every launch of the kernels of a program.
listeners: list[Callable[[Program], None]] = []
# Layouts that a program keeps ready: lengths that change at every step must not pile up.
MOST_LAUNCHES = 1024
# Of these, how many are tried before the layout is looked up.
MOST_RECENT = 4

log = logging.getLogger("fxfuse")


def run(program: Program, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of a program; see ``prepare``."""
    return prepare(program)(tensors)


Direct = Callable[..., list[Tensor] | None]
# How outputs are given: not at all, by the operands that they take the place of, or ("True" for None) as tensors.
Manner = tuple[int | None, ...] | tuple[str, ...] | None


@lru_cache(maxsize=4096)
def prepare(program: Program) -> Prepared:
    """The launcher of a program, one for the whole process."""
    return Prepared(program)


class Prepared:
    """A program ready to run. ``kind`` and ``config`` pin the schedule (tests and benchmarks); None: chosen by launch."""

    def __init__(self, program: Program, kind: str | None = None, config: Config | None = None) -> None:
        self.program = program
        self.unsummed, self.sums = without_partial_sums(with_joined_sums(with_early_sums(program)))
        self.kind, self.config = kind, config
        self.launches: dict[tuple, Callable[[Sequence[Tensor], Sequence[Tensor] | None], list[Tensor]]] = {}
        self.direct: dict[tuple, Direct] = {}
        self.recent: dict[Manner, list[Direct]] = {}

    def __call__(self, tensors: Sequence[Tensor], outputs: Sequence[Tensor | None] | None = None,
                 reuse: tuple[int | None, ...] | None = None) -> list[Tensor]:
        """Runs the program into new tensors, or into those of ``outputs`` that are not None (of the shapes and dtypes that
        ``reference.allocate`` would give; strides are free), or into the operands that ``reuse`` names, one for each output.

        What is written may share memory with arguments that have no other lanes or rows read after the store: whoever passes it
        answers for that.
        """
        if listeners:
            for listener in listeners:
                listener(self.program)
        if outputs is None:
            for direct in self.recent.get(reuse, ()):
                results = direct(tensors)
                if results is not None:
                    return results
            return self.look_up(tensors, None, reuse)
        given = [output for output in outputs if output is not None]
        for direct in self.recent.get(tuple([f"{output is None}" for output in outputs]), ()):
            results = direct(tensors, given)
            if results is not None:
                return results
        return self.look_up(tensors, outputs, None)

    def look_up(self, tensors: Sequence[Tensor], outputs: Sequence[Tensor | None] | None, reuse: tuple[int | None, ...] | None
                ) -> list[Tensor]:
        """The same by the layout of every tensor; what has run once is then tried before any layout is looked up."""
        places = None if reuse is None else self.places(tensors, reuse)
        given = outputs if places is None else [None if i is None else tensors[i] for i in places]
        whole = None if given is None else [
            reference.allocate(self.program, form, tensors) if output is None else output
            for form, output in zip(self.program.outputs, given, strict=True)]
        key: tuple = (tensors[0].get_device(), *[(t.shape, t.stride(), t.dtype, t.data_ptr() & 15) for t in tensors])
        if whole is not None:
            key = (*key, *[(t.stride(), t.data_ptr() & 15) for t in whole])
        launch = self.launches.get(key)
        if launch is None and ahead.rehearsing():
            self.compile_ahead(tensors, whole, tensors[0].device)
            return whole or [reference.allocate(self.program, form, tensors) for form in self.program.outputs]
        if launch is None:
            if len(self.launches) >= MOST_LAUNCHES:
                self.launches.clear()
                self.direct.clear()
            launch = self.launches[key] = self.specialize(tensors, whole)
        if places is not None and getattr(launch, "kind", "looped") == "looped":
            return self.look_up(tensors, None, None)  # whole rows did not fit this device
        if self.sums or (getattr(launch, "kind", "") == "looped" and _overwrites(self.unsummed, outputs or (), tensors)):
            return _into(whole, self._summed(launch(tensors, None)))
        results = launch(tensors, whole)
        if isinstance(launch, Launch):
            manner: Manner = reuse if outputs is None else tuple([f"{output is None}" for output in outputs])
            self.remember((key, manner), manner, partial(launch.direct, tensors, outputs, places))
        return results

    def remember(self, key: tuple, manner: Manner, compose: Callable[[bool], Direct | None]) -> None:
        """Puts the generated form of a launch first among the recent ones; one that is there already did not recognise these
        tensors (they differ in what torch's guard compares and launches do not), and is made anew without that guard."""
        recent = self.recent.setdefault(manner, [])
        known = self.direct.get(key)
        if known is None or known in recent:
            direct = compose(known is None)
            if known is not None:
                recent.remove(known)
            if direct is None:
                return
            self.direct[key] = known = direct
        recent.insert(0, known)
        del recent[MOST_RECENT:]

    def places(self, tensors: Sequence[Tensor], reuse: Sequence[int | None]) -> list[int | None] | None:
        """The operands in whose memory outputs are stored: those that lie as the outputs would. None: nothing is stored in place.

        Not where a later walk along a row reads what an earlier one would have overwritten."""
        kind = self.kind or choose_kind(self.unsummed, reference.axis_widths(self.unsummed, tensors))
        if kind in (None, "looped") or self.sums:
            return None
        forms = forms_of(self.program, tensors)
        places = [i if i is not None and _lies_as(tensors[i], form) else None for form, i in zip(forms, reuse, strict=True)]
        return places if any(i is not None for i in places) else None

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
        if self.is_empty(tensors):
            return lambda tensors, outputs: _nothing(program, tensors, outputs)
        kind = self.kind or choose_kind(program, reference.axis_widths(program, tensors))
        if kind is None:
            return SplitLaunch(split_sums(program))
        return self.fitting(kind, tensors, self.written(tensors, outputs))

    def is_empty(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the domain has no elements."""
        return 0 in reference.domain_shape(self.unsummed, tensors) or 0 in reference.axis_widths(self.unsummed, tensors).values()

    def written(self, tensors: Sequence[Tensor], outputs: Sequence[Tensor] | None) -> Sequence[Tensor]:
        """The tensors that the kernel writes: ``outputs``, or forms of new ones."""
        return forms_of(self.unsummed, tensors) if outputs is None or self.sums else outputs

    def compile_ahead(self, tensors: Sequence[Tensor], outputs: Sequence[Tensor] | None, device: torch.device) -> None:
        """Has the kernels of a launch on such tensors compiled in other processes; they may be forms on the meta device."""
        if self.is_empty(tensors):
            return
        program, outputs = self.unsummed, self.written(tensors, outputs)
        kind = self.kind or choose_kind(program, reference.axis_widths(program, tensors))
        if kind is None:
            SplitLaunch(split_sums(program)).compile_ahead(tensors, device)
            return
        layout = plan(program, kind, tensors, outputs)
        moved = sum(t.numel() for t in (*tensors, *outputs))
        first, *others = [self.config] if self.config else tuning.likely(program, kind, layout, device, moved)
        Launch(program, kind, layout, first, outputs, device).compile_ahead(tensors, outputs)
        with workers.at_leisure():
            for config in others:
                Launch(program, kind, layout, config, outputs, device).compile_ahead(tensors, outputs)

    def fitting(self, kind: str, tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> Callable[..., list[Tensor]]:
        """A launch that the device has room for: the chosen configuration, or the largest below it that fits."""
        program, device = self.unsummed, tensors[0].device
        layout = plan(program, kind, tensors, outputs)

        def ready(trial: Config) -> Callable[[], object] | None:
            launch = Launch(program, kind, layout, trial, outputs, device)
            return partial(launch, tensors, None) if launch.load(tensors, outputs) is None else None

        moved, made = sum(t.numel() for t in (*tensors, *outputs)), sum(t.nbytes for t in outputs)
        config = self.config or tuning.choose(program, kind, layout, device, moved, ready, made=made)
        while True:
            launch = Launch(program, kind, layout, config, outputs, device)
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
        if summed_outputs(self.unsummed) and len(self.unsummed.axes) > 1:
            return SplitLaunch(split_sums(self.unsummed))
        return self.fitting("looped", tensors, outputs)


def forms_of(program: Program, tensors: Sequence[Tensor]) -> list[Tensor]:
    """What ``reference.allocate`` would give for each output, without memory: beside the results, a step may have none to spare."""
    bare = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in tensors]
    return [reference.allocate(program, output, bare) for output in program.outputs]


def _lies_as(tensor: Tensor, form: Tensor) -> bool:
    """Has a tensor dtype, sizes and strides of another? The stride of a single element, as tiles of rows have it, is any."""
    strides = [(a, b) for size, a, b in zip(form.shape, tensor.stride(), form.stride(), strict=True) if size != 1]
    return (tensor.dtype, tensor.shape) == (form.dtype, form.shape) and all(a == b for a, b in strides)


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
    return _into(outputs, reference.execute(program, tensors))


def _overwrites(program: Program, outputs: Sequence[Tensor | None], tensors: Sequence[Tensor]) -> bool:
    """Whether columns are read after the walk that stores an output where an argument begins: by a later walk, or a gather after it.

    What a walk itself reads of a block it has read before it stores there.
    """
    begin = {t.data_ptr() for t in tensors}
    flow = Dataflow(program)
    stored = [max(flow.depth[value] for value, _ in output.stores) for output in program.outputs]
    walks = [flow.depth[v] - 1 for v in flow.live if flow.is_reduction(v)]
    walks += [flow.depth[v] for v in flow.live if v in flow.gathers]
    walks += [depth for form, depth in zip(program.outputs, stored, strict=True) if form.columns is not None]
    return any(output is not None and depth < max(walks, default=0) and output.data_ptr() in begin
               for output, depth in zip(outputs, stored, strict=False))


def _into(outputs: Sequence[Tensor] | None, results: list[Tensor]) -> list[Tensor]:
    """The results, copied to where they are wanted."""
    return results if outputs is None else [output.copy_(result) for output, result in zip(outputs, results, strict=True)]


class SplitLaunch:
    """Two programs in place of one: rows and statistics, then the sums that need them."""

    def __init__(self, split: Split) -> None:
        self.split, self.rows, self.sums = split, prepare(split.rows), prepare(split.sums)
        self.kept = sum(1 for part, _ in split.order if part == 0)

    def compile_ahead(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        rows = [reference.allocate(self.split.rows, output, tensors) for output in self.split.rows.outputs]
        self.rows.compile_ahead(tensors, None, device)
        self.sums.compile_ahead([*tensors, *rows[self.kept:]], None, device)

    def __call__(self, tensors: Sequence[Tensor], outputs: Sequence[Tensor] | None) -> list[Tensor]:
        rows = self.rows(tensors)
        sums = self.sums([*tensors, *rows[self.kept:]])
        return _into(outputs, [(rows, sums)[part][k] for part, k in self.split.order])
