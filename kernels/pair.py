"""Two launches of one program as one: the query's rotation and the key's, in one grid.

They read different tensors of the same kind, perhaps of different sizes, and neither needs the other. As one kernel they leave no
gap between them, and the smaller one fills the tail of the larger. The instances up to ``first_tiles`` work on the first set of
tensors, the rest on the second, with as many rows to a tile as each has heads. What cannot share a kernel (sums over rows, long rows)
is launched twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from fxfuse import reference
from fxfuse.emit import Schedule, Writer, tensors_of
from fxfuse.kernels import configuration, library, rows, tuning, workers
from fxfuse.kernels.arguments import check_arguments
from fxfuse.kernels.catalogue import choose_kind, next_power_of_2, schedule_for
from fxfuse.kernels.configuration import Config
from fxfuse.kernels.direct import Made, Stage, compose, names_of
from fxfuse.kernels.invoke import Kernel
from fxfuse.kernels.launch import MOST_LAUNCHES, MOST_RECENT, Prepared, plan, prepare
from fxfuse.kernels.layout import Layout, shares_columns
from fxfuse.kernels.single import Launch
from fxfuse.kernels.source import HEADER, size_names, stride_names, summed_outputs, unspecialized, wrapped
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
            self.launches[key] = pair_launch(self.single, first, second)
        launch = self.launches[key]
        if launch is None:
            return self.single(first), self.single(second)
        results = launch(first, second)
        if key not in self.known and (generated := launch.direct(first, second)) is not None:
            self.known.add(key)
            self.recent = [generated, *self.recent[:MOST_RECENT - 1]]
        return results


def pair_launch(single: Prepared, first: Tensors, second: Tensors) -> PairLaunch | None:
    """One kernel for both, or None where they are no kernels that hold whole rows. It is tuned as the pair that it is."""
    for tensors in (first, second):
        check_arguments(single.program, tensors)
    plans = pair_plans(single, first, second)
    if plans is None:
        return None

    def ready(config: Config) -> Callable[[], object] | None:
        pair = PairLaunch(single, plans, config, first[0].device)
        return partial(pair, first, second) if pair.load(first, second) is None else None

    moved = moved_by(plans, first, second)
    made = sum(t.nbytes for part in plans for t in part.outputs)
    config = single.config or tuning.choose(single.program, "rows", plans[0].layout, first[0].device, moved, ready, plans[1].layout,
                                            made)
    pair = PairLaunch(single, plans, config, first[0].device)
    return pair if pair.load(first, second) is None else None


def compile_pair_ahead(single: Prepared, first: Tensors, second: Tensors, device: torch.device) -> None:
    """Has the kernels compiled in other processes; the tensors may be forms on the meta device."""
    plans = pair_plans(single, first, second)
    if plans is None:
        single.compile_ahead(first, None, device)
        single.compile_ahead(second, None, device)
        return
    layouts = plans[0].layout, plans[1].layout
    usual, *others = tuning.likely(single.program, "rows", layouts[0], device, moved_by(plans, first, second), layouts[1])
    PairLaunch(single, plans, usual, device).compile_ahead(first, second)
    with workers.at_leisure():
        for config in others:
            PairLaunch(single, plans, config, device).compile_ahead(first, second)


class Plan(NamedTuple):
    """How one set of tensors is seen, and what is written."""

    layout: Layout
    outputs: Sequence[Tensor]


Plans = tuple[Plan, Plan]


def pair_plans(single: Prepared, first: Tensors, second: Tensors) -> Plans | None:
    """Of both sets, if one kernel that holds whole rows can serve them."""
    program = single.unsummed
    if single.sums or summed_outputs(program) or single.is_empty(first) or single.is_empty(second):
        return None
    if single.kind not in (None, "rows") or any(
            choose_kind(program, reference.axis_widths(program, tensors)) != "rows" for tensors in (first, second)):
        return None
    outputs = [single.written(tensors, None) for tensors in (first, second)]
    one, two = (Plan(plan(program, "rows", tensors, out), out) for tensors, out in zip((first, second), outputs, strict=True))
    return (one, two) if one.layout.widths == two.layout.widths else None


def moved_by(plans: Plans, first: Tensors, second: Tensors) -> int:
    """Elements."""
    return sum(t.numel() for t in (*first, *second, *plans[0].outputs, *plans[1].outputs))


def second_config(config: Config, program: Program, layout: Layout) -> Config:
    """The configuration of the first, with fewer rows if a tile has more than the second has heads."""
    nested = config.rows > 1 and shares_columns(program, layout)
    return replace(config, rows=min(config.rows, next_power_of_2(layout.sizes[-1])) if nested else config.rows)


def schedule_of(launch: Launch) -> Schedule:
    blocks = configuration.blocks_of(launch.kind, launch.config, dict(launch.layout.widths))
    return schedule_for(launch.program, launch.layout, launch.kind, launch.config, blocks, launch.able)


class PairLaunch:
    """One kernel over two sets of tensors of fixed layouts."""

    def __init__(self, single: Prepared, plans: Plans, config: Config, device: torch.device) -> None:
        program = single.unsummed
        one, two = (Launch(program, "rows", part.layout, own, part.outputs, device) for part, own in zip(
            plans, (config, second_config(config, program, plans[1].layout)), strict=True))
        schedules = schedule_of(one), schedule_of(two)
        count, other = (len(stride_names(program, schedule)) + len(size_names(schedule)) for schedule in schedules)
        *shared, rows_1, stages = one.variant.numbers[count:]
        numbers = (*one.variant.numbers[:count], *two.variant.numbers[:other], one.variant.tiles, *shared,
                   rows_1, two.config.rows, stages)
        self.kernel = Kernel(library.load(emit_pair(program, *schedules)).kernel, numbers, one.variant.options)
        self.instances = one.variant.tiles + two.variant.tiles
        self.forms, self.device = (one.forms, two.forms), device

    def compile_ahead(self, first: Tensors, second: Tensors) -> None:
        one, two = ([torch.empty_strided(f.shape, f.strides, dtype=f.dtype, device="meta") for f in forms] for forms in self.forms)
        self.kernel.compile_ahead([*first, *one, *second, *two], self.device)

    def load(self, first: Tensors, second: Tensors) -> OutOfResources | None:
        """Compiles and loads the kernel; returns what the device has too little of. The outputs will be new memory, of any size."""
        one, two = ([torch.empty(0, dtype=f.dtype, device=self.device) for f in forms] for forms in self.forms)
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


def emit_pair(program: Program, first: Schedule, second: Schedule) -> str:
    """The Triton source: the rows schedule as a function of its tile, or as one for each set where they lie differently, and a
    kernel that calls it on one set or the other."""
    pointers = [f"p_{tensor.name}" for tensor in tensors_of(program)]
    shared = [*(f"W_{axis}" + ("" if width is None else ": tl.constexpr") for axis, width in program.axes),
              *(f"B_{axis}: tl.constexpr" for axis, _ in program.axes)]
    numbers = [[*(name for name, _, _ in stride_names(program, schedule)), *size_names(schedule)] for schedule in (first, second)]
    changing = [f"{name}_{which}" for which, schedule in enumerate((first, second), 1) for name in unspecialized(program, schedule)]
    tiles = [tile_function("tile_of", program, schedule, [*pointers, *names, *shared])
             for schedule, names in zip((first, second), numbers, strict=True)]
    called = ["tile_of", "tile_of"]
    if tiles[0] != tiles[1]:
        called[1] = "tile_of_second"
        tiles[1] = [line.replace("def tile_of(", "def tile_of_second(") for line in tiles[1]]
    own = [[f"{name}_{which}" for name in pointers] for which in (1, 2)]
    counted = [[f"{name}_{which}" for name in names] for which, names in enumerate(numbers, 1)]
    bare = [name.split(":")[0] for name in shared]
    header = HEADER.format(title="A row program on two sets of tensors", kind="rows", interpreted="",
                           reading="a program instance holds whole rows of one set or the other in registers",
                           program="\n".join(f"    {line}" for line in str(program).splitlines()))
    never = ", ".join(f'"{name}"' for name in (*changing, "first_tiles"))
    constants = ["ROWS_1: tl.constexpr", "ROWS_2: tl.constexpr", "STAGES: tl.constexpr"]
    return "\n".join([
        header, "", *tiles[0], "", "", *([*tiles[1], "", ""] if called[1] != called[0] else []),
        f"@triton.jit(do_not_specialize=[{never}])", "def kernel(",
        *wrapped([*own[0], *own[1], *counted[0], *counted[1], "first_tiles", *shared, *constants]), "):",
        "    tile = tl.program_id(0)",
        "    if tile < first_tiles:",
        f"        {called[0]}(tile, {', '.join([*own[0], *counted[0], *bare, 'ROWS_1', 'STAGES'])})",
        "    else:",
        f"        {called[1]}(tile - first_tiles, {', '.join([*own[1], *counted[1], *bare, 'ROWS_2', 'STAGES'])})",
        "",
    ])


def tile_function(name: str, program: Program, schedule: Schedule, parameters: list[str]) -> list[str]:
    """The lines of a function that does one tile."""
    writer = Writer(program, schedule)
    rows.write(writer, tile="tile")
    wanted = wrapped(["tile", *parameters, "ROWS: tl.constexpr", "STAGES: tl.constexpr"])
    return ["@triton.jit", f"def {name}(", *wanted, "):", *writer.lines]
