"""What the text of a kernel depends on besides the program, and where in it a piece of text stands."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..program import Argument, Output, Program


def tensors_of(program: Program) -> tuple[Argument | Output, ...]:
    """The tensors of a launch in order: arguments, then outputs."""
    return (*program.arguments, *program.outputs)


@dataclass(frozen=True)
class Access:
    """How one tensor lies at a launch: the coalesced leading dimensions it varies over; whether its columns are strided."""

    dims: tuple[bool, ...]
    strided: bool = False


@dataclass(frozen=True)
class Schedule:
    """A skeleton and everything about a launch that changes the text of a kernel (numbers stay parameters).

    kind:     "rows" | "tiled" | "looped", a module of ``kernels/`` each
    rank:     leading dimensions left after coalescing; 0: there is one row
    accesses: of the arguments, then of the outputs
    single:   a tile holds one row, so that rows need no mask
    exact:    axes whose width is a multiple of their block, so that columns need no mask
    wide:     some offset can pass 2**31 elements: indices are int64
    nested:   the rows of a tile differ in the last leading dimension only (the heads of one position): what does not vary over it is
              loaded once for all of them
    whole:    nested tiles are always full, so that their rows need no mask
    together: nested, by axis: how many rows of a tile the threads load at once. What the rows share is loaded in that shape and then
              repeated, so that each thread has it for the columns of its own, in the same registers for all of its rows
    reload:   what reductions and later values both need is loaded for each of them (from the cache, the second time), so that no
              register holds it meanwhile
    hints:    "loads": what is read once leaves the cache first, what all rows share last; "all": stores pass it by, too
    blocks:   looped, with sums over rows: the number of blocks of a row, each of which has its own sums; rows: the number of segments
              that a row is held in, side by side (0: it is one)
    pairs:    values are rounded to bfloat16 two at a time
    early:    what waits for no reduction is stored and summed before them, so that no register holds it meanwhile
    """

    kind: str
    rank: int
    accesses: tuple[Access, ...]
    single: bool
    exact: tuple[str, ...]
    wide: bool
    nested: bool = False
    whole: bool = False
    together: tuple[tuple[str, int], ...] = ()
    reload: bool = False
    hints: str = ""
    blocks: int = 0
    pairs: bool = False
    early: bool = False


@dataclass
class Scope:
    """Where columns are: per axis the name of the index and of its mask (None: every column exists)."""

    index: dict[str, str]
    mask: dict[str, str | None]
    suffix: str = ""
    pairs: dict[str, tuple[str, str | None]] = field(default_factory=dict)  # axis -> index and mask of 2 B interleaved columns
    written: set[int] = field(default_factory=set)
    running: dict[int, str] = field(default_factory=dict)  # maxima that a walk is still looking for, as they are so far
    again: frozenset[int] = frozenset()  # loads that a later walk along the row repeats: worth keeping in the cache
