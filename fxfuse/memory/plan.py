"""What a memory plan says: for each block a point between saving everything and saving next to nothing, and what that adds up to.

A ``Choice`` is what the compiler is told, as text in ``Backend.plan``: equal text, one compiled graph. A ``Point`` is a choice with
what it costs at given sizes. A ``MemoryPlan`` gives each block a point, so that the largest sum of what lives at once fits the budget:

    peak = static + max over k ( saved by blocks up to k + gradients of blocks from k on + transient of block k's backward )

The same maximum runs over the forwards and over the head. All sizes are in bytes, all times in milliseconds of the device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

# The last point of a graph's chain, before anything is known of it; and where there is hardly room, that with what it saves on the host
# and its wide part in a few tiles.
LEAST, LEAST_IN_TILES = "least", "least in tiles"
FEW_TILES = 4
# Plans that name no tensor. none: no budget, saved is what eager saves, less the cheap outputs of fused ops. save: all that eager
# saves. keep: as none, for a model with a budget.
PLAIN = ("none", "save", "keep", LEAST, LEAST_IN_TILES)


@dataclass(frozen=True)
class Choice:
    """What becomes of tensors that a block would save; each is named by its node in the joint graph.

    recompute: computed again in the backward; offload: kept on the host in between; what is named in neither is kept on the device
    tiles:     into how many tiles of rows the wide part of the block is cut, 1: not at all
    keep:      saved though it is computed again without a plan (keeping.py)
    """

    recompute: tuple[str, ...] = ()
    offload: tuple[str, ...] = ()
    tiles: int = 1
    keep: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The text of ``Backend.plan``: ``keep``, or as in ``recompute:mm,mm_2;offload:primals_1;tiles:4``."""
        named = {"recompute": self.recompute, "offload": self.offload, "keep": self.keep}
        parts = [f"{key}:{','.join(names)}" for key, names in named.items() if names]
        parts += [f"tiles:{self.tiles}"] * (self.tiles > 1)
        return ";".join(parts) or "keep"

    @classmethod
    def parse(cls, text: str) -> Choice:
        """The choice that ``str`` wrote; ValueError for any other text."""
        if text in PLAIN:
            return cls(tiles=FEW_TILES if text == LEAST_IN_TILES else 1)
        choice = cls()
        for part in text.split(";"):
            key, _, value = part.partition(":")
            if key in ("recompute", "offload", "keep") and value:
                told: dict[str, Any] = {key: tuple(value.split(","))}
                choice = replace(choice, **told)
            elif key == "tiles" and value.isdecimal():
                choice = replace(choice, tiles=int(value))
            else:
                raise ValueError(f"plan takes {', '.join(map(repr, PLAIN))} or choices such as "
                                 f"'recompute:mm,mm_2;offload:mm_4;tiles:4', got {text!r}")
        if str(choice) != text:
            raise ValueError(f"plan {text!r} is not in normal form; write {str(choice)!r}")
        return choice


def tiles_of(plan: str) -> int:
    """Into how many tiles of rows a plan cuts the wide part of a block."""
    return Choice.parse(plan).tiles


@dataclass(frozen=True)
class Kept:
    """One tensor that a block's backward reads and that is not among the block's weights."""

    name: str  # of its node in the joint graph
    what: str  # for people: "product 8192x18944 (mlp.gate_proj)", "attention", "block input"
    bytes: int
    recompute_ms: float = 0.0  # to have it again, where the point does not keep it


@dataclass(frozen=True)
class Point:
    """One way to run a block, and what it costs there: one block, one forward and backward, at the sizes of the plan."""

    choice: Choice
    name: str = "keep all"  # for people
    saved_bytes: int = 0  # on the device between forward and backward, without weights; what a neighbour holds anyway is not in it
    offloaded_bytes: int = 0  # on the host in between
    recompute_ms: float = 0.0  # more than the fastest point takes
    copy_ms: float = 0.0  # copies to and from the host, by their launches and the bandwidth they take; what nothing hides is the plan's
    tiles_ms: float = 0.0  # smaller matmuls, more launches
    spared_ms: float = 0.0  # less than the fastest point takes, by keeping cheap outputs
    forward_transient_bytes: int = 0  # the most that lives during the forward beyond weights, inputs and what is saved by then
    backward_transient_bytes: int = 0  # the most that lives during the backward beyond what was saved (and weights)
    # Of these, what is not there where the block before sends as much: its tensors go piece by piece while this one's forward runs, and
    # come back so while its backward does.
    forward_spared_bytes: int = 0
    backward_spared_bytes: int = 0
    away_input_bytes: int = 0  # part of offloaded_bytes: the block's input
    tiles: int = 1
    saved: tuple[Kept, ...] = ()
    recomputed: tuple[Kept, ...] = ()
    offloaded: tuple[Kept, ...] = ()

    @property
    def text(self) -> str:
        """What ``Backend.plan`` is for this point."""
        return str(self.choice)

    @property
    def ms(self) -> float:
        """What the point costs beyond the fastest one."""
        return self.recompute_ms + self.copy_ms + self.tiles_ms


@dataclass(frozen=True)
class BlockPlan:
    """The point of one block."""

    module: str  # path in the model
    kind: str  # class name
    point: Point
    weights_gradient_bytes: int = 0  # gradients that its backward leaves


@dataclass
class MemoryPlan:
    """A point for each block, in the order in which they run, and what that comes to."""

    budget: int  # bytes; without the margin
    device: str
    blocks: list[BlockPlan] = field(default_factory=list)
    parts: dict[str, int] = field(default_factory=dict)  # what the predicted peak is made of; adds up to it
    predicted_peak: int = 0
    measured_peak: int | None = None  # of the last whole step under this plan
    margin: int = 0  # bytes of the budget left free on purpose
    step_ms: float = 0.0  # predicted, blocks and head, at these points
    extra_ms: float = 0.0  # of that, what recomputation, copies and tiles cost
    waiting_ms: float = 0.0  # of that, for copies that the step's work does not hide
    kept_weights: int = 0  # bytes of weights that stay dequantized (kept_weights.py), part of the peak
    rates: str = ""  # name of the table or measurement that the times come from
    frontier: list[tuple[int, float]] = field(default_factory=list)  # (predicted peak, extra ms) of plans for other budgets
    notes: list[str] = field(default_factory=list)

    def points(self) -> Counter[str]:
        """How many blocks have which point, by its name."""
        return Counter(block.point.name for block in self.blocks)

    @property
    def error(self) -> float | None:
        """(measured - predicted) / measured peak, once a step has been measured."""
        return None if not self.measured_peak else (self.measured_peak - self.predicted_peak) / self.measured_peak


@dataclass(frozen=True)
class Held:
    """What lives through a step because somebody else holds it.

    leaf:    is the first block's input a leaf of autograd, so that it stays on the device whatever becomes of it
    outputs: bytes that whoever holds the model's output holds with it, the backward long
    """

    leaf: bool = False
    outputs: int = 0

    def beside(self, points: Sequence[Point]) -> int:
        """Bytes of the first block's input where they stay beside what the plan counts."""
        return points[0].away_input_bytes if self.leaf and points else 0


class Peak(NamedTuple):
    """The largest sum of what blocks hold at once, and what it is made of. held: by others (``Held``)."""

    total: int = 0
    saved: int = 0
    gradients: int = 0
    transient: int = 0
    where: str = ""
    held: int = 0


def peak_of(points: Sequence[Point], gradients: Sequence[int], *, accumulating: bool = False, held: Held = Held()) -> Peak:
    """The most that blocks hold at once over a forward and backward: saved tensors, gradients of weights, transients.

    points, gradients: of each block, in the order of the forward. A block's gradients appear in its backward; ``accumulating``: the
    gradients of all blocks are there all the time, and a block's are there twice until they are added.

    Tensors of one block are on their way to or from the host at a time: out, until the next block that sends some; back, from the
    backward of the block after on (that is in the transient of a block that sends some itself). ``held``: what others hold meanwhile.
    """
    present = sum(gradients) if accumulating else 0
    first = held.beside(points)
    peak, saved, under_way = Peak(present, 0, present), 0, 0
    for k, point in enumerate(points):
        alike = under_way and under_way == point.offloaded_bytes
        transient = point.forward_transient_bytes + under_way - (point.forward_spared_bytes if alike else 0)
        beside = first if k else 0
        if present + saved + transient + beside > peak.total:
            peak = Peak(present + saved + transient + beside, saved, present, transient, f"forward of block {k}", beside)
        saved += point.saved_bytes
        under_way = point.offloaded_bytes or under_way
    for k in reversed(range(len(points))):
        present += 0 if accumulating else gradients[k]
        transient = points[k].backward_transient_bytes + (gradients[k] if accumulating else 0)
        if points[k].offloaded_bytes:  # what arrives meanwhile is the next one's, of which there may be more than of its own, or none
            under_way = leaving_bytes(points[:k])
            transient -= points[k].offloaded_bytes + (points[k].backward_spared_bytes if under_way == points[k].offloaded_bytes else 0)
        transient, beside = transient + under_way, first + held.outputs
        if present + saved + transient + beside > peak.total:
            peak = Peak(present + saved + transient + beside, saved, present, transient, f"backward of block {k}", beside)
        saved -= points[k].saved_bytes
    return peak


def leaving_bytes(points: Sequence[Point]) -> int:
    """What has not left the device when these blocks have run: what the last one that sends tensors to the host sends."""
    return next((point.offloaded_bytes for point in reversed(points) if point.offloaded_bytes), 0)


def told(parts: Mapping[str, int]) -> str:
    """Parts of a peak as a sentence: ``weights 4.90 GiB, saved by blocks 1.53 GiB``."""
    return ", ".join(f"{name} {size_text(count)}" for name, count in parts.items() if count)


def size_text(count: int) -> str:
    """Bytes for people."""
    if abs(count) >= 1 << 30:
        return f"{count / (1 << 30):.2f} GiB"
    return f"{count / (1 << 20):.1f} MiB" if abs(count) >= 1 << 20 else f"{count / 1024:.1f} KiB"
