"""A map beside thin products at one place of a graph: in one pass, or apart as the graph had it, whichever was faster there.

The choice is made at the first call by timing both on a part of the rows, into memory of its own (the place may be told to write over
its operands), and is kept on disk (thin_choice.py). A place remembers the launch for each number of rows and each layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxfuse.kernels import ahead, thin_choice
from fxfuse.kernels.invoke import INTERPRETED
from fxfuse.kernels.launch import prepare
from fxfuse.kernels.thin_map import BothMap, Operands, TermsMap, ThinMap, sizes_of
from fxfuse.kernels.thin_map_source import Beside
from fxfuse.kernels.thin_sites import launch_at
from fxfuse.lowering import free_places
from fxfuse.products.calls import one_product
from fxfuse.program import parse

KEPT = 256  # layouts that a place remembers
SCRATCH = 2**28  # bytes that are written to choose


class Down(NamedTuple):
    """How a result down is wanted. wide: in float32. lying: as [R, N], not [N, R]. pair: the product across that reads the same matrix
    with it, where the two were one call."""

    wide: bool
    lying: bool
    pair: int | None


class Site(NamedTuple):
    """What a place computes: a program and what is beside it; for each product across its buffer and first column there, the widths of
    the buffers; the results down; and which operands the outputs may lie over (reuse.py)."""

    text: str
    beside: Beside
    across: tuple[tuple[int, int], ...]
    widths: tuple[int, ...]
    down: tuple[Down, ...]
    places: tuple[int | None, ...] = ()
    saved: tuple[int, ...] = ()
    sums: int = 0  # so many of the program's outputs, the last, are arguments with their terms


class Given(NamedTuple):
    """The tensors of a call. ins: of the program; added: left and right of each term; rights, lefts: the factors across and down;
    buffers: into which the products across are written (None: a new one)."""

    ins: Sequence[Tensor]
    added: Sequence[Tensor]
    rights: Sequence[Tensor]
    lefts: Sequence[Tensor]
    buffers: Sequence[Tensor | None]


def map_site(site: Site) -> Callable[..., list[Tensor | None]]:
    """A function of what ``Given`` has: the program's outputs (None: nothing reads it), the buffers, the results down."""
    place = _Place(site)

    def thin_map(*given: Any) -> list[Tensor | None]:
        return place(Given(*given))

    def compile_ahead(on: torch.device, *forms: Any) -> None:
        place.compile_ahead(on, Given(*forms))

    thin_map.compile_ahead = compile_ahead  # type: ignore[attr-defined]
    thin_map.__qualname__, thin_map.__module__ = "thin_map", "fxfuse"  # generated code names a function by these
    return thin_map


class Written(NamedTuple):
    """Where results go. outs: the program's (None: not wanted); buffers of the products across; downs."""

    outs: list[Tensor | None]
    buffers: list[Tensor]
    downs: list[Tensor]


class _Place:
    def __init__(self, site: Site) -> None:
        self.site, self.program = site, parse(site.text)
        self.names = [argument.name for argument in self.program.arguments]
        self.results = self.program.outputs[: len(self.program.outputs) - site.sums]
        self.prepared = prepare(replace(self.program, outputs=self.results))
        self.stored = [output.name in site.beside.stored for output in self.program.outputs]
        self.kind = ThinMap if not site.beside.added else BothMap if site.beside.down else TermsMap
        self.ready: dict[tuple, ThinMap | None] = {}

    def __call__(self, given: Given) -> list[Tensor | None]:
        key = self._key(given)
        launch = None
        if key is not None and (key in self.ready or not ahead.rehearsing()):
            if key not in self.ready:
                self._choose(key, given)
            launch = self.ready[key]
        places = free_places(given.ins, self.site.places, self.site.saved) or (None,) * len(self.stored)
        to = self.allocated(given, [place if wanted or launch is None else None
                                    for wanted, place in zip(self.stored, places, strict=True)])  # fmt: skip
        if launch is None:
            self.apart(given, to)
        elif INTERPRETED:
            launch(*self.operands(given, to).tensors)
        else:
            self._launch(launch, given, to)
        return [*to.outs, *to.buffers, *to.downs]

    def _key(self, given: Given) -> tuple | None:
        """The layout of a call; None for one that the kernel does not take."""
        low = 0
        for tensor in (*given.ins, *given.added, *given.rights, *given.lefts, *given.buffers):
            low |= 0 if tensor is None else tensor.data_ptr()
        if low & 15 or not all(tensor.is_contiguous() for tensor in given.ins):
            return None
        thin = (*given.added, *given.rights, *given.lefts, *(buffer for buffer in given.buffers if buffer is not None))
        return (given.ins[0].numel(), given.ins[0].get_device(), *[tensor.stride() for tensor in thin])

    def _choose(self, key: tuple, given: Given) -> None:
        """The launch for a layout, None where the products are better done apart."""
        if len(self.ready) >= KEPT:
            self.ready.clear()
        operands = self.operands(given, self.allocated(given, [0] * len(self.stored)))  # nothing is written: any memory will do
        sizes = sizes_of(self.site.text, self.site.beside, operands)
        config = None if sizes is None else thin_choice.config_of(self.kind, sizes, given.ins[0], partial(self.trial, given))
        if sizes is None or config is None:
            self.ready[key] = None
            return
        self.ready[key] = launch = self.kind(sizes, config, given.ins[0].device)
        launch.load(*operands.tensors)

    def trial(self, given: Given) -> thin_choice.Question:
        """The question who is faster, on some of the rows and into new memory."""
        width = given.ins[0].shape[-1]
        height = max(1024, SCRATCH // (2 * width * len(self.stored)) // 256 * 256)
        added = [t if i % 2 else t[:height] for i, t in enumerate(given.added)]
        few = Given([t.view(-1, width)[:height] for t in given.ins], added, given.rights, [t[:height] for t in given.lefts],
                    [None] * len(given.buffers))  # fmt: skip
        ins = [t[(None,) * (self.program.rank - 1)] for t in few.ins]
        to = self.allocated(few._replace(ins=ins), [None] * len(self.stored))
        everything: list[Tensor | None] = [torch.empty_like(ins[0]) if out is None else out for out in to.outs]
        operands = self.operands(few, to)
        return thin_choice.Question(self.kind, sizes_of(self.site.text, self.site.beside, operands), operands.tensors,
                                    len(operands.stored) + len(operands.results), operands.matrices[0], (),
                                    lambda: self.apart(few._replace(ins=ins), to._replace(outs=everything)))  # fmt: skip

    def allocated(self, given: Given, places: Sequence[int | None]) -> Written:
        """Where results go: an operand's place, or new memory. What is not wanted has a place or (None) is not stored."""
        first, width = given.ins[0], given.ins[0].shape[-1]
        height = first.numel() // width
        outs = [given.ins[place] if place is not None else torch.empty_like(first) if wanted else None
                for wanted, place in zip(self.stored, places, strict=True)]  # fmt: skip
        buffers = [first.new_empty((height, columns)) if buffer is None else buffer
                   for buffer, columns in zip(given.buffers, self.site.widths, strict=True)]  # fmt: skip
        downs = [first.new_empty((thin.rank, width) if down.lying else (width, thin.rank), dtype=torch.float32 if down.wide else None)
                 for thin, down in zip(self.site.beside.down, self.site.down, strict=True)]  # fmt: skip
        return Written(outs, buffers, downs)

    def operands(self, given: Given, to: Written) -> Operands:
        """The tensors of a launch, as matrices."""
        width = given.ins[0].shape[-1]
        stored = [out.view(-1, width) for out, wanted in zip(to.outs, self.stored, strict=True) if wanted and out is not None]
        return Operands(tuple(t.view(-1, width) for t in given.ins), tuple(given.added), tuple(given.rights), tuple(given.lefts),
                        tuple(stored), (*self._across(to), *self._down(to)))  # fmt: skip

    def _across(self, to: Written) -> list[Tensor]:
        return [to.buffers[buffer][:, start : start + thin.rank]
                for (buffer, start), thin in zip(self.site.across, self.site.beside.across, strict=True)]  # fmt: skip

    def _down(self, to: Written) -> list[Tensor]:
        return [t.t() if down.lying else t for t, down in zip(to.downs, self.site.down, strict=True)]

    def apart(self, given: Given, to: Written) -> None:
        """The program, then the products, each by whoever is fastest at it alone."""
        beside, width = self.site.beside, given.ins[0].shape[-1]
        ins = list(given.ins)
        sums = {output.name: out for output, out in zip(self.program.outputs, to.outs, strict=True)}
        for k, thin in enumerate(beside.added):
            i = self.names.index(thin.name)
            summed = sums.get(f"sum_{thin.name}")
            summed = torch.empty_like(ins[i]) if summed is None else summed
            torch.addmm(ins[i].view(-1, width), *given.added[2 * k : 2 * k + 2], alpha=thin.factor, out=summed.view(-1, width))
            ins[i] = summed
        outs = self.prepared(ins, outputs=to.outs[: len(self.results)])
        matrices = {output.name: out.view(-1, width) for output, out in zip(self.results, outs, strict=True)}
        across, down = self._across(to), self._down(to)
        together = {how.pair: k for k, how in enumerate(self.site.down) if how.pair is not None}
        for k, thin in enumerate(beside.across):
            matrix = matrices[thin.name]
            if k in together:
                other = together[k]
                thin_choice.pair(matrix, given.rights[k], given.lefts[other], across[k], down[other], thin.factor,
                                 beside.down[other].factor)  # fmt: skip
            else:
                one_product(matrix, given.rights[k], across[k], thin.factor)
        for k, (thin, how) in enumerate(zip(beside.down, self.site.down, strict=True)):
            if how.pair is None:
                matrix, left = matrices[thin.name], given.lefts[k]
                torch.mul(torch.mm(left.t(), matrix) if how.lying else torch.mm(matrix.t(), left), thin.factor, out=to.downs[k])

    def _launch(self, launch: ThinMap, given: Given, to: Written) -> None:
        """By addresses: nothing is sliced or checked."""
        size = given.ins[0].element_size()
        parts = given.ins[0].new_empty(launch.length, dtype=torch.float32)
        results = [to.buffers[buffer].data_ptr() + start * size for buffer, start in self.site.across]
        read = [t.data_ptr() for t in (*given.ins, *given.added, *given.rights, *given.lefts)]
        stored = [out.data_ptr() for out, wanted in zip(to.outs, self.stored, strict=True) if wanted and out is not None]
        places = [*read, *stored, *results, *(t.data_ptr() for t in to.downs)]
        first, second = launch.arranged(places, [parts.data_ptr() + 4 * start for start in launch.offsets])
        device = given.ins[0].get_device()
        launch_at(launch.partial, tuple(first), launch.plan.instances, device)
        if launch.total is not None:
            launch_at(launch.total, tuple(second), launch.sums, device)

    def compile_ahead(self, on: torch.device, given: Given) -> None:
        """Has what a choice will time compiled elsewhere; tensors are forms on the meta device."""
        to = self.allocated(given, [None] * len(self.stored))
        outs = [torch.empty_like(given.ins[0]) if out is None else out for out in to.outs[: len(self.results)]]
        self.prepared.compile_ahead(given.ins, outs, on)
        sizes = sizes_of(self.site.text, self.site.beside, self.operands(given, to))
        if sizes is not None and thin_choice.worth_timing(given.ins[0], on):
            with ahead.announcing(on):
                for config in self.kind.configs:
                    self.kind(sizes, config, on).load(*self.operands(given, to).tensors)
