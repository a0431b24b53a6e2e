"""Two launches of one program as one: the query's rotation and the key's, in one grid.

They read different tensors of the same kind, perhaps of different sizes, and neither needs the other. As one kernel they leave no
gap between them, and the smaller one fills the tail of the larger. The instances up to ``first_tiles`` work on the first set of
tensors, the rest on the second; both run the same code. What cannot share a kernel (other layouts, sums over rows, long rows) is
launched twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from fxfuse.emit import Schedule, Writer, tensors_of
from fxfuse.kernels import configuration, library, rows
from fxfuse.kernels.catalogue import next_power_of_2, schedule_for
from fxfuse.kernels.configuration import Config
from fxfuse.kernels.direct import Made, Stage, compose, names_of
from fxfuse.kernels.invoke import Kernel
from fxfuse.kernels.launch import MOST_LAUNCHES, MOST_RECENT, Prepared, prepare
from fxfuse.kernels.single import Launch
from fxfuse.kernels.source import HEADER, size_names, stride_names, wrapped
from fxfuse.program import Program

Tensors = Sequence[Tensor]
Outputs = list[Tensor]


@lru_cache(maxsize=1024)
def prepare_pair(program: Program) -> Callable[[Tensors, Tensors], tuple[Outputs, Outputs]]:
    """The launcher of a program on two sets of tensors, one for the whole process."""
    return PreparedPair(program)


class PreparedPair:
    """Keeps, for each pair of layouts that it has seen, the kernel that serves both; or that two launches do."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.single = prepare(program)
        self.launches: dict[tuple, PairLaunch | None] = {}
        self.recent: list[Callable[[Tensors, Tensors], tuple[Outputs, Outputs] | None]] = []
        self.known: set[tuple] = set()  # layouts with a generated launch

    def __call__(self, first: Tensors, second: Tensors) -> tuple[Outputs, Outputs]:
        for direct in self.recent:
            results = direct(first, second)
            if results is not None:
                return results
        key = tuple([(t.shape, t.stride(), t.dtype, t.device, t.data_ptr() & 15) for t in (*first, *second)])
        if key not in self.launches:
            if len(self.launches) >= MOST_LAUNCHES:
                self.launches.clear()
                self.known.clear()
            self.launches[key] = pair_launch(self.program, self.single, first, second)
        launch = self.launches[key]
        if launch is None:
            return self.single(first), self.single(second)
        results = launch(first, second)
        if key not in self.known and (generated := launch.direct(first, second)) is not None:
            self.known.add(key)
            self.recent = [generated, *self.recent[:MOST_RECENT - 1]]
        return results


def pair_launch(program: Program, single: Prepared, first: Tensors, second: Tensors) -> PairLaunch | None:
    """One kernel for both, or None where their kernels are not the same code."""
    if single.sums:
        return None
    one, two = (single.specialize(tensors, None) for tensors in (first, second))
    if not isinstance(one, Launch) or not isinstance(two, Launch) or one.summed or {one.kind, two.kind} != {"rows"}:
        return None
    config = shared_config(one, two)
    one, two = with_config(one, config), with_config(two, config)
    schedule = shared_schedule(one, two)
    if schedule is None or one.layout.widths != two.layout.widths:
        return None
    pair = PairLaunch(program, schedule, one, two)
    return pair if pair.load(first, second) is None else None


def shared_config(one: Launch, two: Launch) -> Config:
    """The configuration of the first; with fewer rows and warps if a tile has more rows than the second has heads."""
    config = one.config
    nested = schedule_of(one).nested and schedule_of(two).nested
    rows = min(config.rows, next_power_of_2(two.layout.sizes[-1])) if nested else config.rows
    return replace(config, rows=rows, warps=max(1, config.warps * rows // config.rows))


def with_config(launch: Launch, config: Config) -> Launch:
    if launch.config == config:
        return launch
    outputs = [torch.empty_strided(f.shape, f.strides, dtype=f.dtype, device="meta") for f in launch.forms]
    return Launch(launch.program, launch.kind, launch.layout, config, outputs, launch.device)


def schedule_of(launch: Launch) -> Schedule:
    blocks = configuration.blocks_of(launch.kind, launch.config, dict(launch.layout.widths))
    return schedule_for(launch.program, launch.layout, launch.kind, launch.config, blocks, launch.able)


def shared_schedule(one: Launch, two: Launch) -> Schedule | None:
    """The schedule that serves both; masked where the tiles of one are not always full. None: there is none."""
    first, second = schedule_of(one), schedule_of(two)
    whole, wide = first.whole and second.whole, first.wide or second.wide
    first, second = (replace(schedule, whole=whole, wide=wide) for schedule in (first, second))
    return first if first == second else None


class PairLaunch:
    """One kernel over two sets of tensors of fixed layouts."""

    def __init__(self, program: Program, schedule: Schedule, one: Launch, two: Launch) -> None:
        count = len(stride_names(program, schedule)) + len(size_names(schedule))
        shared = one.variant.numbers[count:]
        numbers = (*one.variant.numbers[:count], *two.variant.numbers[:count], one.variant.tiles, *shared)
        self.kernel = Kernel(library.load(emit_pair(program, schedule)).kernel, numbers, one.variant.options)
        self.instances = one.variant.tiles + two.variant.tiles
        self.forms, self.device = (one.forms, two.forms), one.device

    def load(self, first: Tensors, second: Tensors) -> OutOfResources | None:
        """Compiles and loads the kernel; returns what the device has too little of."""
        one, two = self.outputs()
        try:
            self.kernel.load([*first, *one, *second, *two])
        except OutOfResources as lacking:
            return lacking
        return None

    def outputs(self) -> tuple[Outputs, Outputs]:
        one, two = ([torch.empty_strided(f.shape, f.strides, dtype=f.dtype, device=self.device) for f in forms]
                    for forms in self.forms)
        return one, two

    def direct(self, first: Tensors, second: Tensors) -> Callable[..., tuple[Outputs, Outputs]] | None:
        """The same launch as a generated function."""
        operands: list[str] = []
        made: list[Made] = []
        for group, (tensors, forms) in enumerate(zip((first, second), self.forms, strict=True)):
            outputs = [Made(f"o{group}_{k}", form) for k, form in enumerate(forms)]
            operands += [*names_of(group, len(tensors)), *[output.name for output in outputs]]
            made += outputs
        one, two = (", ".join(o.name for o in made if o.name.startswith(f"o{group}_")) for group in (0, 1))
        stage = Stage(self.kernel, self.instances, tuple(operands))
        return compose([first, second], made, [stage], f"[{one}], [{two}]", guarded=False)

    def __call__(self, first: Tensors, second: Tensors) -> tuple[Outputs, Outputs]:
        one, two = self.outputs()
        self.kernel([*first, *one, *second, *two], self.instances)
        return one, two


def emit_pair(program: Program, schedule: Schedule) -> str:
    """The Triton source: the rows schedule as a function of its tile, and a kernel that calls it on one set or the other."""
    writer = Writer(program, schedule)
    rows.write(writer, tile="tile")
    pointers = [f"p_{tensor.name}" for tensor in tensors_of(program)]
    numbers = [name for name, _, _ in stride_names(program, schedule)] + size_names(schedule)
    changing = {*size_names(schedule),
                *(name for name, k, _ in stride_names(program, schedule) if tensors_of(program)[k].columns is None)}
    widths = [f"W_{axis}" + ("" if width is None else ": tl.constexpr") for axis, width in program.axes]
    blocks = [f"B_{axis}: tl.constexpr" for axis, _ in program.axes]
    shared = [*widths, *blocks, "ROWS: tl.constexpr", "STAGES: tl.constexpr"]
    own, counted = ([[f"{name}_{which}" for name in names] for which in (1, 2)] for names in (pointers, numbers))
    bare = [name.split(":")[0] for name in shared]
    header = HEADER.format(title="A row program on two sets of tensors", kind="rows", interpreted="",
                           reading="a program instance holds whole rows of one set or the other in registers",
                           program="\n".join(f"    {line}" for line in str(program).splitlines()))
    unspecialized = ", ".join(f'"{name}_{which}"' for which in (1, 2) for name in numbers if name in changing)
    return "\n".join([
        header, "", "@triton.jit", "def tile_of(", *wrapped(["tile", *pointers, *numbers, *shared]), "):", *writer.lines, "", "",
        f'@triton.jit(do_not_specialize=[{unspecialized}, "first_tiles"])', "def kernel(",
        *wrapped([*own[0], *own[1], *counted[0], *counted[1], "first_tiles", *shared]), "):",
        "    tile = tl.program_id(0)",
        "    if tile < first_tiles:",
        f"        tile_of(tile, {', '.join([*own[0], *counted[0], *bare])})",
        "    else:",
        f"        tile_of(tile - first_tiles, {', '.join([*own[1], *counted[1], *bare])})",
        "",
    ])
