"""What follows from the row program of an attention alone, found once: the programs of a chunk, and which operand is a mask.

A chunk's rows are ordered (queries, heads of a group): the query heads that share a key/value head lie behind each query, so that a
chunk of queries is a part of one large matrix and no copy. Its programs have that order too: [batch, kv, group, queries | keys].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from ..chunk_kernels import RunInto, runner
from ..program import Program, parse
from .hiding import Mask, mask_of
from .programs import backward_program, cotangent_of, statistics_of


@dataclass(frozen=True)
class ChunkProgram:
    """A program, and what a chunk asks of it each time."""

    program: Program

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(argument.name for argument in self.program.arguments)

    @cached_property
    def runners(self) -> dict[str, RunInto]:
        """By kind of device, found when it is first run there."""
        return {}

    def on(self, device: str) -> RunInto:
        if device not in self.runners:
            self.runners[device] = runner(self.program, device)
        return self.runners[device]


@dataclass(frozen=True)
class Prepared:
    """scores: the argument that is the product; others, cotangent: names of the further arguments; statistics: of the outputs."""

    forward: ChunkProgram
    backward: ChunkProgram
    scores: str
    others: tuple[str, ...]
    statistics: tuple[str, ...]
    cotangent: str
    mask: Mask | None


@lru_cache(maxsize=256)
def prepared(text: str, scores: str) -> Prepared:
    """For a program that ``with_statistics`` gave. By its text, as calls have it: a program is long to compare."""
    program = parse(text)
    return Prepared(
        ChunkProgram(by_group(program)),
        ChunkProgram(by_group(backward_program(program, scores))),
        scores,
        tuple(a.name for a in program.arguments if a.name != scores),
        statistics_of(program),
        cotangent_of(program),
        mask_of(replace(program, outputs=program.outputs[:1]), scores),
    )


def by_group(program: Program) -> Program:
    """The program over [batch, kv, group, queries] for one over [batch, heads, queries]."""

    def split(rows: tuple[bool, ...]) -> tuple[bool, ...]:
        batch, heads, queries = rows
        return batch, heads, heads, queries

    return replace(
        program,
        rank=4,
        arguments=tuple(replace(a, rows=split(a.rows)) for a in program.arguments),
        outputs=tuple(replace(o, rows=split(o.rows)) for o in program.outputs),
    ).verify()
