"""A point for each block, so that what lives at once fits a budget and the step takes the least time.

Within a kind, early blocks get the smaller point of two and late blocks the larger: what a late block saves is freed first in the
backward, and is not there any more when an early block needs room to compute again. Two or three points a kind are used, since each is
a graph to compile; where between two points the change comes is chosen so that the budget is used up.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from ..errors import FxfuseError
from .costs import Rates
from .plan import PLAIN, BlockPlan, Held, MemoryPlan, Peak, Point, leaving_bytes, peak_of, size_text, told
from .points import LINK, Block

# A plan with one more graph must be faster by this part of a step; and where plans were made before, with one more to compile.
_WORTH_A_GRAPH, _WORTH_COMPILING = 0.004, 0.005


class BudgetTooSmall(FxfuseError, ValueError):
    """No plan fits the budget. The message has the least that would, and what it is made of."""


@dataclass
class Group:
    """Blocks of one kind: their places in the order of the forward, and what each of them can do."""

    kind: str
    places: list[int]
    paths: list[str]
    block: Block


@dataclass
class Outside:
    """What is there beside the blocks, in bytes.

    static:    by name, what lives all the time: weights, optimizer state
    gradients: of weights outside of blocks
    saved:     by graphs outside of blocks (final norm, head), all the backward long
    transient: the most that the head needs for itself, when every block has saved what it saves
    ms:        what those graphs take
    held:      what others hold through the step
    """

    static: dict[str, int] = field(default_factory=dict)
    gradients: int = 0
    saved: int = 0
    transient: int = 0
    ms: float = 0.0
    held: Held = field(default_factory=Held)


@dataclass
class Problem:
    """What a plan is made for. ``accumulating``: gradients of the step before are still there when a step begins."""

    groups: list[Group]
    outside: Outside
    accumulating: bool = False
    saved_only: bool = False  # nothing is known of the device's allocator: only saved bytes are planned
    rates: Rates | None = None  # of the device; without them, copies to the host are taken to be hidden
    host: int | None = None  # bytes of host memory that offloaded tensors may take; what is beyond stays on the device

    def total(self, points: Sequence[Point]) -> tuple[int, dict[str, int]]:
        """The predicted peak with these points, and its parts."""
        outside = self.outside
        if self.saved_only:
            saved = sum(point.saved_bytes for point in points)
            return saved, {"saved by blocks": saved}
        gradients = [0] * len(points)
        for group in self.groups:
            for place in group.places:
                gradients[place] = group.block.weights_gradient_bytes
        peak = peak_of(points, gradients, accumulating=self.accumulating, held=outside.held)
        saved = sum(point.saved_bytes for point in points)
        live = sum(gradients) if self.accumulating else 0
        transient = outside.transient + leaving_bytes(points)
        beside = outside.held.beside(points)
        head = Peak(live + saved + transient + beside, saved, live, transient, "head", beside)
        # What the head makes of gradients is part of what it needs; those of weights outside of blocks are there when blocks go back.
        candidates = ((peak, outside.gradients), (head, outside.gradients if self.accumulating else 0))
        worst, apart = max(candidates, key=lambda pair: pair[0].total + pair[1])
        parts = outside.static | {
            "gradients": apart + worst.gradients,
            "saved by blocks": worst.saved,
            "saved outside of blocks": outside.saved,
            "inputs and outputs that others hold": worst.held,
            f"in use by the {worst.where}": worst.transient,
        }
        beyond = sum(point.offloaded_bytes for point in points) - (sys.maxsize if self.host is None else self.host)
        if beyond > 0:
            parts["no room on the host"] = beyond
        return sum(parts.values()), parts

    def plain_ms(self) -> float:
        """What a step takes at the fastest points."""
        return self.outside.ms + sum(len(g.places) * (g.block.forward_ms + g.block.backward_ms) for g in self.groups)

    def waiting_ms(self, points: Sequence[Point]) -> float:
        """What the device waits for copies to the host and back.

        Between a block that sends tensors and the next one that does, the tensors have as long to leave as the forwards from the one to
        the other take, and as long to come back as the backwards do (offload_runtime.py): no more than one block's are ever under way.
        """
        if self.rates is None or not any(point.offloaded_bytes for point in points):
            return 0.0
        blocks = {place: group.block for group in self.groups for place in group.places}
        waiting = forward = backward = 0.0
        sent = 0
        for place, point in enumerate(points):
            forward += blocks[place].forward_ms
            backward += blocks[place].backward_ms + point.ms
            if point.offloaded_bytes:
                out, back = (sent / (LINK * rate) * 1e3 for rate in (self.rates.to_host, self.rates.from_host))
                waiting += max(out - forward, 0.0) + max(back - backward, 0.0)
                sent, forward, backward = point.offloaded_bytes, 0.0, 0.0
        return waiting

    def extra_ms(self, points: Sequence[Point]) -> float:
        """What a step takes beyond that at the fastest points."""
        return sum(point.ms for point in points) + self.waiting_ms(points)

    def kept_weights(self, room: int) -> tuple[int, float]:
        """(bytes of dequantized weights that fit, what is spared by keeping them): what memory is for that nothing else needs, as
        a byte of these is written at the rate of a copy and one that is saved takes arithmetic to have again."""
        whole = sum(len(g.places) * g.block.dequantized_bytes for g in self.groups)
        spared = sum(len(g.places) * g.block.dequantization_ms for g in self.groups)
        kept = min(whole, max(room, 0))
        return kept, spared * kept / max(whole, 1)

    def start(self, choose: Callable[[list[Point]], Point]) -> list[Point]:
        """One point for each block, the same within a kind."""
        points: dict[int, Point] = {}
        for group in self.groups:
            points |= dict.fromkeys(group.places, choose(group.block.points))
        return [points[place] for place in sorted(points)]


def make_plan(problem: Problem, budget: int, device: str, *, margin: int = 0, rates: str = "") -> MemoryPlan:
    """The fastest plan within ``budget - margin``. BudgetTooSmall says what the least would be."""
    points = choose_points(problem, budget - margin)
    peak, parts = problem.total(points)
    extra, waiting = problem.extra_ms(points), problem.waiting_ms(points)
    step = problem.plain_ms() + extra
    kept, spared = (0, 0.0) if extra or problem.saved_only else problem.kept_weights(budget - margin - peak)
    if not extra and not problem.saved_only:
        points = _keep_more(points, problem, budget - margin - kept)
        peak, parts = problem.total(points)
    if kept:
        parts, peak = parts | {"dequantized weights": kept}, peak + kept
    spared += sum(point.spared_ms for point in points)
    blocks: dict[int, BlockPlan] = {}
    for group in problem.groups:
        for place, path in zip(group.places, group.paths, strict=True):
            blocks[place] = BlockPlan(path, group.kind, points[place], group.block.weights_gradient_bytes)
    ordered = [blocks[place] for place in sorted(blocks)]
    return MemoryPlan(budget, device, ordered, parts, peak, None, margin, step - spared, extra, waiting, kept, rates)


def fastest_plan(problem_with: Callable[[bool], Problem], budget: int, device: str, *, margin: int = 0, rates: str = ""
                 ) -> tuple[Problem, MemoryPlan]:  # fmt: skip
    """The plan, with points in tiles where the others cost time or do not fit. ``problem_with(tiles)``: with such points, which take
    seconds to find, or without."""
    problem = problem_with(False)
    try:
        plan = make_plan(problem, budget, device, margin=margin, rates=rates)
        if not plan.extra_ms or problem.saved_only:
            return problem, plan
    except BudgetTooSmall:
        if problem.saved_only:
            raise
    problem = problem_with(True)
    return problem, make_plan(problem, budget, device, margin=margin, rates=rates)


def frontier(problem: Problem, count: int = 8) -> list[tuple[int, float]]:
    """(predicted peak, extra ms) of plans between the least memory and no recomputation at all."""
    low, high = problem.total(least_points(problem))[0], problem.total(problem.start(lambda points: points[0]))[0]
    found: dict[int, float] = {}
    for k in range(count):
        points = choose_points(problem, low + (high - low) * k // max(count - 1, 1))
        found[problem.total(points)[0]] = problem.extra_ms(points)
    return sorted(found.items())


def choose_points(problem: Problem, limit: int) -> list[Point]:
    """A point for each block, by its place. Raises BudgetTooSmall."""
    points = least_points(problem)
    least, parts = problem.total(points)
    if least > limit:
        raise BudgetTooSmall(
            f"memory={size_text(limit)} cannot hold a training step of this model at these sizes: the least possible is "
            f"{size_text(least)} ({told(parts)}). Give at least that, or a smaller batch, shorter sequences, fewer trained weights")
    for _ in range(2 if len(problem.groups) > 1 else 1):
        # The kind with the most to gain first; a second round for what the others have left.
        for group in sorted(problem.groups, key=lambda g: -len(g.places) * g.block.points[-1].ms):
            points = _best_of(group, points, problem, limit)
    return points


def least_points(problem: Problem) -> list[Point]:
    """The points with the lowest peak that one point for each kind can have."""
    points = problem.start(lambda choices: choices[-1])
    for group in problem.groups:
        points = min((_with(points, dict.fromkeys(group.places, choice)) for choice in group.block.points),
                     key=lambda p: (problem.total(p)[0], problem.extra_ms(p)))
    return points


def _best_of(group: Group, points: list[Point], problem: Problem, limit: int) -> list[Point]:
    """The fastest points for one kind, the others' as they are: two of its points, then perhaps a third between them."""
    step = max(problem.plain_ms(), 1e-9)

    compiled = group.block.compiled
    planned_before = bool(compiled - {*PLAIN})

    def cost(found: Sequence[Point]) -> float:
        texts = {found[place].text for place in group.places}
        new = len(texts - compiled) if planned_before else 0
        return problem.extra_ms(found) + step * (_WORTH_A_GRAPH * (len(texts) - 1) + _WORTH_COMPILING * new)

    def fits(found: Sequence[Point]) -> bool:
        return problem.total(found)[0] <= limit

    best = points
    for small in group.block.points:
        if not fits(_with(points, dict.fromkeys(group.places, small))):
            continue
        for large in group.block.points:
            if large.ms > small.ms:
                continue
            found = _split(points, group.places, small, large, fits, cost(best))
            if found is not None and (cost(found), problem.total(found)[0]) < (cost(best), problem.total(best)[0]):
                best = found
    early = [place for place in group.places if best[place] is best[group.places[0]]]
    if len(early) < len(group.places):
        for middle in group.block.points:
            found = _split(best, early, best[early[0]], middle, fits, cost(best))
            if found is not None and cost(found) < cost(best):
                best = found
    return best


def _keep_more(points: list[Point], problem: Problem, limit: int) -> list[Point]:
    """With cheap outputs kept in late blocks, where nothing else needs the memory: a byte of them spares no more than its writing."""
    step = max(problem.plain_ms(), 1e-9)
    for group in problem.groups:
        fastest, compiled = group.block.points[0], group.block.compiled
        if any(points[place] is not fastest for place in group.places) or problem.total(points)[0] >= limit:
            continue
        best, most = points, 0.0
        for roomier in group.block.roomier():
            found = _split(points, group.places, fastest, roomier, lambda found: problem.total(found)[0] <= limit)
            own = [] if found is None else [found[place] for place in group.places]
            texts = {point.text for point in own}
            new = len(texts - compiled) if compiled - {*PLAIN} else 0
            gain = sum(point.spared_ms for point in own) - step * (_WORTH_A_GRAPH * (len(texts) - 1) + _WORTH_COMPILING * new)
            if found is not None and gain > most:
                best, most = found, gain
        points = best
    return points


def _split(points: Sequence[Point], places: Sequence[int], small: Point, large: Point, fits: Callable[[Sequence[Point]], bool],
           most_ms: float = math.inf) -> list[Point] | None:
    """``large`` for as many late blocks as fit, ``small``, which fits for all, for those before them; None if that takes more than
    ``most_ms``, as far as the points themselves tell."""
    low, high = 0, len(places)  # how many are small: the fewest that fit, by halving
    spared = small.ms - large.ms
    if spared > 0:
        rest = sum(point.ms for point in _with(points, dict.fromkeys(places, large)))
        high = math.floor(min((most_ms - rest) / spared, high))
        if high < 0 or (high < len(places) and not fits(_with(points, _assigned(places, high, small, large)))):
            return None
    while low < high:
        count = (low + high) // 2
        if fits(_with(points, _assigned(places, count, small, large))):
            high = count
        else:
            low = count + 1
    return _with(points, _assigned(places, high, small, large))


def _assigned(places: Sequence[int], count: int, small: Point, large: Point) -> dict[int, Point]:
    return {place: small if i < count else large for i, place in enumerate(places)}


def _with(points: Iterable[Point], changed: dict[int, Point]) -> list[Point]:
    return [changed.get(place, point) for place, point in enumerate(points)]


def corrected(outside: Outside, difference: int) -> Outside:
    """``outside`` with what a measured peak had beyond the prediction as a part of its own."""
    known = outside.static.get("not explained", 0)
    return replace(outside, static=outside.static | {"not explained": known + difference})
