"""A map of matrices and the thin products of what it reads and gives, in one pass over them.

    g = s dZ B, dB = s dZ' h,   dA = h2' y        where dZ, y = a gate's backward of (gate, up, dY)

Beside a low-rank adapter stands a row program that computes each element from the elements at its place. Its results are matrices
as large as its operands, and the gradients of the adapters read them again: twice the traffic. Here they are multiplied where they are
made, and those that nothing else reads are never stored. thin_map_source.py has the text; results are the same from run to run,
products and sums are float32 and are rounded once, of results rounded to their dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fxfuse import reference
from fxfuse._torch import disable_current_modes
from fxfuse.emit import tensors_of
from fxfuse.kernels import library
from fxfuse.kernels.abilities import of_device
from fxfuse.kernels.invoke import Kernel
from fxfuse.kernels.layout import INT32_ELEMENTS, is_map
from fxfuse.kernels.thin_map_source import Beside, source
from fxfuse.kernels.thin_pair import DTYPES, PARTS, SUMMED, multiprocessors
from fxfuse.kernels.tuning import CLEARLY_FASTER
from fxfuse.program import Program, parse

MOST_RANK = 32  # sums of a higher rank would not stay in registers


@dataclass(frozen=True)
class Config:
    """rows, columns: of a tile. spans: tiles side by side, which an instance goes through one after the other. warps: of an instance.
    stages: tiles on their way at a time. waves: instances for a multiprocessor. registers: most of a thread, 0: as many as it takes."""

    rows: int = 64
    columns: int = 64
    spans: int = 2
    warps: int = 8
    stages: int = 3
    waves: int = 6
    registers: int = 128


# As an H200 ranked them at 8192 x 14336 and rank 16: products of a gate's gradients 458 and 506 us (apart 543), terms of gate and up
# 179 and 180 us (a pass over as many bytes takes 175).
CONFIGS = (Config(columns=128, spans=1, registers=0), Config(spans=1))
TERMS = (Config(), Config(columns=128, spans=1, registers=0))

# Products of results and terms of operands in one: a warpgroup by itself has rows of both in the same registers.
BOTH = (Config(warps=4, stages=2, registers=0), Config(spans=1, warps=4, registers=0))


class Sizes(NamedTuple):
    """rows M, columns N; strides of all tensors in order: of rows, and of columns where those of a thin matrix are free; what is
    computed (the program's text), and what is beside it."""

    rows: int
    columns: int
    strides: tuple[int, ...]
    wide: bool
    text: str
    beside: Beside


class Operands(NamedTuple):
    """The tensors of a launch. matrices: of the program's arguments. added: left, right of each term. across: the right factors, down:
    the left ones. Then what is written: stored matrices, results across, results down ([N, R] in any layout)."""

    matrices: tuple[Tensor, ...]
    added: tuple[Tensor, ...]
    across: tuple[Tensor, ...]
    down: tuple[Tensor, ...]
    stored: tuple[Tensor, ...]
    results: tuple[Tensor, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.matrices, *self.added, *self.across, *self.down, *self.stored, *self.results)


@lru_cache(maxsize=1024)
def suits(program: Program) -> bool:
    """Is this a map of matrices of one 16-bit dtype, finite where all of them are 0: so are rows and columns beyond the last."""
    arguments = program.arguments
    if not is_map(program) or program.math != "float32" or not arguments:
        return False
    (axis, _), = program.axes
    tensors = tensors_of(program)
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1 or reference.torch_dtype(arguments[0].dtype) not in DTYPES:
        return False
    if any(tensor.columns != axis or not all(tensor.rows) for tensor in tensors):
        return False
    with disable_current_modes():  # a graph may be traced meanwhile
        dtype, width = reference.torch_dtype(arguments[0].dtype), program.width(axis) or 1
        nothing = [torch.zeros([1] * program.rank + [width], dtype=dtype) for _ in arguments]
        return all(bool(result.isfinite().all()) for result in reference.execute(program, nothing))


def sizes_of(text: str, beside: Beside, o: Operands) -> Sizes | None:
    """The sizes of a launch; None if the kernel does not take such tensors. Matrices are [M, N]."""
    rows, columns = o.matrices[0].shape
    ranks = [thin.rank for thin in (*beside.added, *beside.across, *beside.down)]
    sixteen = (*o.matrices, *o.added, *o.across, *o.down, *o.stored)
    lefts = (*o.added[::2], *o.down)
    fits = (rows * columns > 0 and all(0 < rank <= MOST_RANK for rank in ranks) and {t.dtype for t in sixteen} == {o.matrices[0].dtype}
            and all(m.shape == (rows, columns) and m.stride(1) == 1 for m in (*o.matrices, *o.stored))
            and all(left.shape[0] == rows and left.stride(1) == 1 for left in lefts)
            and triton.cdiv(columns, 64) * rows < 2**31)  # fmt: skip
    if not fits:
        return None
    strides = (*(m.stride(0) for m in (*o.matrices, *o.stored)), *_free(o.added, "lr"), *_free(o.across, "r"), *_free(o.down, "l"))
    wide = any((m.shape[0] + 512) * m.stride(0) > INT32_ELEMENTS for m in sixteen)
    results = tuple(stride for result in o.results for stride in result.stride())
    return Sizes(rows, columns, (*strides, *results), wide, text, beside)


def _free(thin: Sequence[Tensor], sides: str) -> list[int]:
    """Strides of thin matrices: of the left ones (``l``) that of rows, of the right ones both."""
    return [stride for i, t in enumerate(thin) for stride in (t.stride() if sides[i % len(sides)] == "r" else t.stride()[:1])]


class Plan(NamedTuple):
    """What the first kernel is launched with; in how many parts the results come."""

    numbers: tuple[int, ...]
    options: dict[str, Any]
    instances: int
    blocks: int
    splits: int


def plan(sizes: Sizes, config: Config, units: int, early: bool) -> Plan:
    """Blocks of columns times splits of rows fill a device of ``units`` multiprocessors ``config.waves`` times."""
    blocks = triton.cdiv(sizes.columns, config.columns * config.spans)
    tiles = triton.cdiv(sizes.rows, config.rows)
    tiles_each = triton.cdiv(tiles, max(1, config.waves * units // blocks))
    splits = triton.cdiv(tiles, tiles_each)
    given = sizes.strides[: len(sizes.strides) - 2 * _results(sizes.beside)]
    numbers = (*given, sizes.rows, tiles_each, sizes.columns, config.rows, config.columns, config.stages, int(early))
    options = {"num_warps": config.warps} | ({"maxnreg": config.registers} if config.registers else {})
    return Plan(numbers, options, blocks * splits, blocks, splits)


def _results(beside: Beside) -> int:
    return len(beside.across) + len(beside.down)


@lru_cache(maxsize=256)
def module_of(text: str, beside: Beside, spans: int, exact: bool, wide: bool, pairs: bool) -> Any:
    """The generated file."""
    return library.load(source(parse(text), beside, spans, exact, wide, pairs))


class ThinMap:
    """Launches both kernels for one set of sizes, on one device. Tensors: as ``Operands`` has them, flat."""

    configs, bar = CONFIGS, CLEARLY_FASTER

    def __init__(self, sizes: Sizes, config: Config, device: torch.device) -> None:
        able, beside = of_device(device), sizes.beside
        exact = sizes.columns % (config.columns * config.spans) == 0
        module = module_of(sizes.text, beside, config.spans, exact, sizes.wide, able.pairs)
        self.plan = made = plan(sizes, config, multiprocessors(device), able.early)
        self.read = len(parse(sizes.text).arguments) + 2 * len(beside.added) + _results(beside)
        self.matrices, self.added = len(parse(sizes.text).arguments), 2 * len(beside.added)
        self.stored, self.across = len(beside.stored), len(beside.across)
        counts = [*(made.blocks for _ in beside.across), *(made.splits for _ in beside.down)]
        numbers = [*(sizes.rows * thin.rank for thin in beside.across), *(sizes.columns * thin.rank for thin in beside.down)]
        self.offsets, self.length = _places(counts, numbers)
        self.partial = Kernel(module.parts, made.numbers, made.options)
        strides = sizes.strides[len(sizes.strides) - 2 * len(counts) :]
        each = [n for k in range(len(counts)) for n in (numbers[k], counts[k], *strides[2 * k : 2 * k + 2])]
        self.sums = sum(triton.cdiv(number, SUMMED) for number in numbers)
        options = {"num_warps": 4} | ({"launch_pdl": True} if able.early else {})
        self.total = Kernel(module.sums, (*each, PARTS, SUMMED, int(able.early)), options) if counts else None

    def arranged(self, tensors: Sequence[Any], parts: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """The tensors (or their addresses) in the order of either kernel's arguments; ``parts``: where each result's parts lie."""
        thin = tensors[self.matrices + self.added : self.read]
        stored = tensors[self.read : self.read + self.stored]
        results = tensors[self.read + self.stored :]
        beside = [x for pair in zip(thin, parts, strict=True) for x in pair]
        first = [*tensors[: self.matrices], *stored, *tensors[self.matrices : self.matrices + self.added], *beside]
        return first, [x for pair in zip(parts, results, strict=True) for x in pair]

    def load(self, *tensors: Tensor) -> None:
        """Compiles both and loads them onto the device. Raises Triton's OutOfResources where one does not fit."""
        part = tensors[0].new_empty(4, dtype=torch.float32)
        first, second = self.arranged(tensors, [part] * len(self.offsets))
        self.partial.load(first)
        if self.total is not None:
            self.total.load(second)

    def __call__(self, *tensors: Tensor) -> None:
        parts = tensors[0].new_empty(self.length, dtype=torch.float32)
        first, second = self.arranged(tensors, [parts[start:] for start in self.offsets])
        self.partial(first, self.plan.instances)
        if self.total is not None:
            self.total(second, self.sums)


class TermsMap(ThinMap):
    """With terms of operands alone. What it is compared with adds them out of place, which a graph would not have done: it has to be
    faster than that by more."""

    configs, bar = TERMS, 0.6


class BothMap(ThinMap):
    """With terms of operands and products of results."""

    configs, bar = BOTH, 0.75


def _places(counts: Sequence[int], numbers: Sequence[int]) -> tuple[list[int], int]:
    """Where the parts of each result begin in one buffer, 16 bytes aligned, and its length."""
    starts, end = [], 0
    for count, number in zip(counts, numbers, strict=True):
        starts.append(end)
        end += triton.cdiv(count * number, 4) * 4
    return starts, end
