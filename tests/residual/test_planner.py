"""Points for blocks under a budget: what fits, what is fastest, what adds up. No model: numbers alone."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch

from fxfuse.memory import costs
from fxfuse.memory.costs import TABLE, Rates
from fxfuse.memory.plan import Choice, Peak, Point, leaving_bytes, peak_of
from fxfuse.memory.planner import (
    BudgetTooSmall,
    Group,
    Outside,
    Problem,
    choose_points,
    frontier,
    least_points,
    make_plan,
)
from fxfuse.memory.points import LINK, Block

point = partial(Point, forward_transient_bytes=130)
KEEP = point(Choice(), "keep", saved_bytes=100, backward_transient_bytes=40)
HALF = point(Choice(("a",)), "half", saved_bytes=50, recompute_ms=1.0, backward_transient_bytes=90)
LEAST = point(Choice(("a", "b")), "least", saved_bytes=10, recompute_ms=3.0, backward_transient_bytes=120)
AWAY = point(Choice((), ("a",)), "away", saved_bytes=10, offloaded_bytes=10**9, backward_transient_bytes=60)


def problem(count: int = 6, points: tuple[Point, ...] = (KEEP, HALF, LEAST), **changes: object) -> Problem:
    block = Block(list(points), forward_ms=5.0, backward_ms=10.0, weights_gradient_bytes=7)
    group = Group("Layer", list(range(count)), [f"layers.{i}" for i in range(count)], block)
    return Problem([group], Outside(static={"weights": 1000}, transient=30), **changes)  # type: ignore[arg-type]


def test_the_peak_is_where_saved_gradients_and_transients_are_largest_together() -> None:
    """Against a step played out by hand: forward, head, backward, in the order in which a step allocates and frees."""
    for points in product((KEEP, HALF, LEAST), repeat=3):
        saved, most, gradients = 0, 0, 0
        for point in points:
            most = max(most, saved + point.forward_transient_bytes)
            saved += point.saved_bytes
        most = max(most, saved)
        for point in reversed(points):
            gradients += 7
            most = max(most, saved + gradients + point.backward_transient_bytes)
            saved -= point.saved_bytes
        assert peak_of(points, [7, 7, 7]).total == max(most, gradients)


def test_a_plan_fits_and_is_the_fastest_of_two_points() -> None:
    """Compared with every way to give early blocks one point and late blocks another."""
    for limit in range(1280, 1900, 60):
        chosen = choose_points(problem(), limit)
        assert problem().total(chosen)[0] <= limit
        best = min(sum(p.ms for p in candidate)
                   for small, large in product((KEEP, HALF, LEAST), repeat=2) for cut in range(7)
                   if problem().total(candidate := [small] * cut + [large] * (6 - cut))[0] <= limit)
        assert sum(p.ms for p in chosen) <= best + 0.004 * problem().plain_ms() * 2


def test_parts_add_up_to_the_predicted_peak() -> None:
    for limit in (1300, 1500, 2000):
        plan = make_plan(problem(), limit, "cpu")
        assert sum(plan.parts.values()) == plan.predicted_peak <= limit
        assert [block.module for block in plan.blocks] == [f"layers.{i}" for i in range(6)]
        assert plan.extra_ms == pytest.approx(sum(block.point.ms for block in plan.blocks))


def test_more_memory_is_never_slower() -> None:
    times = [ms for _, ms in frontier(problem())]
    assert times == sorted(times, reverse=True)
    assert times[-1] == 0


def test_a_budget_that_nothing_fits_says_the_least_and_its_parts() -> None:
    least = problem().total(least_points(problem()))[0]
    with pytest.raises(BudgetTooSmall, match=r"the least possible is 1\.\d KiB \(weights 1\.0 KiB, gradients"):
        choose_points(problem(), least - 1)
    assert problem().total(choose_points(problem(), least))[0] == least


def test_gradients_that_stay_are_counted_twice_where_they_are_added() -> None:
    points = [KEEP] * 3
    live = peak_of(points, [7, 7, 7], accumulating=True)
    assert live.total == max(300 + 40 + 21 + 7, 200 + 130 + 21)
    assert live.gradients == 21


@pytest.mark.parametrize(("compiled", "ms", "is_new"), [
    ((), 0.95, True), (("recompute:a",), 0.95, False), (("recompute:a",), 0.9, True), (("least", "keep"), 0.95, True)])  # fmt: skip
def test_a_graph_is_compiled_for_a_later_plan_where_it_is_worth_it(compiled: tuple[str, ...], ms: float, is_new: bool) -> None:
    """Half a hundredth of a step of 90 ms; the first plan compiles what is fastest."""
    known = point(Choice(("a",)), "known", saved_bytes=10, recompute_ms=1.0)
    new = point(Choice(("b",)), "new", saved_bytes=10, recompute_ms=ms)
    asked = problem(points=(new, known))
    asked.groups[0].block = replace(asked.groups[0].block, compiled=frozenset(compiled))
    assert {p.name for p in choose_points(asked, 10_000)} == {"new" if is_new else "known"}


MORE = point(Choice(keep=("c",)), "more", saved_bytes=160, spared_ms=1.0, backward_transient_bytes=40)
MOST = point(Choice(keep=("c", "d")), "most", saved_bytes=200, spared_ms=1.5, backward_transient_bytes=40)


def roomy(compiled: tuple[str, ...] = ()) -> Problem:
    asked = problem()
    asked.groups[0].block = replace(asked.groups[0].block, roomier=lambda: [MORE, MOST], compiled=frozenset(compiled))
    return asked


def test_cheap_outputs_are_kept_where_nothing_else_needs_the_memory() -> None:
    """Only then, as many as fit; and what is spared is told, beside the predicted peak."""
    asked = roomy()
    everything = [asked.total(asked.start(lambda points, kept=kept: kept))[0] for kept in (KEEP, MORE, MOST)]
    for limit in range(1280, everything[-1] + 100, 20):
        plan = make_plan(asked, limit, "cpu")
        names = [block.point.name for block in plan.blocks]
        assert plan.predicted_peak == sum(plan.parts.values()) <= limit
        if limit < everything[0]:
            assert not {"more", "most"} & {*names}
            assert names == [point.name for point in choose_points(problem(), limit)]
        else:
            assert plan.step_ms == asked.plain_ms() - sum(block.point.spared_ms for block in plan.blocks)
            assert plan.extra_ms == 0
        if limit in everything:
            assert names == [("keep", "more", "most")[everything.index(limit)]] * 6
    assert {block.point.name for block in make_plan(asked, everything[-1], "cpu").blocks} == {"most"}


def test_cheap_outputs_are_not_worth_a_graph_for_little() -> None:
    """A later plan compiles no graph for less than half a hundredth of a step: 9 ms are, 0.3 ms are not, of 90."""
    asked = roomy(("keep", "recompute:a"))
    assert {block.point.name for block in make_plan(asked, 10_000, "cpu").blocks} == {"most"}
    little = replace(asked.groups[0].block, roomier=lambda: [replace(MORE, spared_ms=0.05)])
    asked.groups[0].block = little
    assert {block.point.name for block in make_plan(asked, 10_000, "cpu").blocks} == {"keep"}
    asked.groups[0].block = replace(little, compiled=frozenset({"keep", MORE.text, "recompute:a"}))
    assert {block.point.name for block in make_plan(asked, 10_000, "cpu").blocks} == {"more"}


def test_dequantized_weights_come_before_cheap_outputs() -> None:
    asked = roomy()
    asked.groups[0].block = replace(asked.groups[0].block, dequantized_bytes=50, dequantization_ms=1.0)
    all_kept = asked.total(asked.start(lambda points: KEEP))[0]
    plan = make_plan(asked, all_kept + 300, "cpu")
    assert plan.kept_weights == 300
    assert {block.point.name for block in plan.blocks} == {"keep"}
    assert {block.point.name for block in make_plan(asked, all_kept + 300 + 6 * 60, "cpu").blocks} == {"more"}


def linked(gigabytes: float) -> Rates:
    """A device whose link carries so many GB a second each way beside a step's other work."""
    return replace(TABLE["NVIDIA H200"], to_host=gigabytes * 1e9 / LINK, from_host=gigabytes * 1e9 / LINK)


@pytest.mark.parametrize(("points", "ms"), [
    ([AWAY, KEEP, KEEP, KEEP, KEEP, KEEP], 0), ([KEEP, KEEP, KEEP, KEEP, KEEP, AWAY], 0),  # nobody else's memory waits for it
    ([AWAY, AWAY, KEEP, KEEP, KEEP, KEEP], 20 + 15),
    ([KEEP, AWAY, KEEP, KEEP, AWAY, KEEP], 10),  # out in three forwards, back in three backwards
    ([AWAY, KEEP, KEEP, KEEP, KEEP, AWAY], 0),
    ([AWAY, HALF, AWAY, KEEP, KEEP, KEEP], 15 + 4),  # what is computed again hides copies too
    ([AWAY] * 6, 5 * 35),
])  # fmt: skip
def test_copies_hide_behind_the_blocks_between_two_that_send(points: list[Point], ms: float) -> None:
    """A gigabyte is 25 ms on its way out, and as long back; a block's forward takes 5 ms, its backward 10."""
    assert problem(rates=linked(40)).waiting_ms(points) == pytest.approx(ms)


def test_tensors_go_to_the_host_where_their_copies_hide_and_are_computed_again_where_they_do_not() -> None:
    keep, half, away = KEEP, replace(HALF, backward_transient_bytes=40), replace(AWAY, saved_bytes=50, offloaded_bytes=50, copy_ms=0.3)
    fast, slow = (problem(points=(keep, half, away), rates=linked(50e-9 * 1e3 / ms)) for ms in (4, 25))  # for a block's fifty bytes
    limit = fast.total([away] * 6)[0]
    assert {p.name for p in choose_points(fast, limit)} == {"away"}
    assert {p.name for p in choose_points(slow, limit)} == {"keep", "half"}


def test_a_host_that_pauses_does_not_make_the_device_look_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    passed = [0.0]
    taken = iter([9.0, 0.5, 0.001, 0.001, 0.003, 0.001, 0.001])  # the first call, then three rounds of two
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(costs.time, "perf_counter", lambda: passed[0])
    assert costs._seconds(lambda: passed.append(passed.pop() + next(taken)), 2) == pytest.approx(0.001)


def test_blocks_of_two_kinds_share_the_budget() -> None:
    big = replace(KEEP, saved_bytes=300)
    groups = [Group("Encoder", [0, 1], ["e.0", "e.1"], Block([KEEP, LEAST], 5, 10, 0)),
              Group("Decoder", [2, 3], ["d.0", "d.1"], Block([big, LEAST], 5, 10, 0))]
    both = Problem(groups, Outside())
    for limit in (200, 400, 600, 900):
        points = choose_points(both, limit)
        assert both.total(points)[0] <= limit
        assert points[0] in (KEEP, LEAST)
        assert points[2] in (big, LEAST)


def test_what_has_not_left_the_device_is_counted() -> None:
    """A block's tensors leave while the next one that sends some runs. In the head, and until they are taken, the last one's wait."""
    away, stays = Point(Choice(offload=("x",)), offloaded_bytes=10, backward_transient_bytes=20), Point(Choice())
    assert leaving_bytes([away, away, stays]) == 10
    assert leaving_bytes([stays]) == 0
    assert peak_of([away, stays, stays], [0, 0, 0]).total == 10
    busy = Point(Choice(), forward_transient_bytes=5, backward_transient_bytes=7)
    assert (peak_of([away, busy], [0, 0]).total, peak_of([busy, away], [0, 0]).total) == (17, 10)
    assert peak_of([busy, busy], [0, 0]).total == 7


def test_while_a_block_goes_back_the_tensors_of_the_one_before_arrive() -> None:
    """A backward has as many bytes counted twice as it sends: more arrive where the block before sends more, none at the first."""
    few, many = (Point(Choice(offload=("x",)), offloaded_bytes=n, backward_transient_bytes=2 * n) for n in (10, 30))
    assert peak_of([few], [0]).total == 10
    assert peak_of([few, few], [0, 0]).total == 20
    assert peak_of([many, few], [0, 0]) == Peak(40, 0, 0, 40, "backward of block 1")
    assert peak_of([few, many], [0, 0]) == Peak(40, 0, 0, 40, "backward of block 1")


def test_tensors_go_and_come_piece_by_piece_between_blocks_that_send_as_much() -> None:
    few = Point(Choice(offload=("x",)), offloaded_bytes=10, forward_transient_bytes=5, backward_transient_bytes=20,
                forward_spared_bytes=3, backward_spared_bytes=6)  # fmt: skip
    many = replace(few, offloaded_bytes=30, backward_transient_bytes=40)
    assert peak_of([few, few], [0, 0]) == Peak(14, 0, 0, 14, "backward of block 1")
    assert peak_of([few, replace(few, forward_transient_bytes=9)], [0, 0]) == Peak(16, 0, 0, 16, "forward of block 1")
    assert peak_of([few, many], [0, 0]).total == 20  # what comes back for the first is all there


def test_what_memory_is_left_when_nothing_is_computed_again_holds_dequantized_weights() -> None:
    found = problem()
    found.groups[0].block.dequantized_bytes, found.groups[0].block.dequantization_ms = 100, 0.5
    plain = make_plan(problem(), 10_000, "cuda:0")
    whole = make_plan(found, 10_000, "cuda:0")
    assert whole.kept_weights == 600
    assert whole.predicted_peak == plain.predicted_peak + 600 == sum(whole.parts.values())
    assert whole.step_ms == pytest.approx(plain.step_ms - 6 * 0.5)
    part = make_plan(found, plain.predicted_peak + 250, "cuda:0", margin=50)
    assert part.kept_weights == 200
    assert part.predicted_peak + 50 == plain.predicted_peak + 250
    tight = make_plan(found, plain.predicted_peak - 1, "cuda:0")
    assert tight.extra_ms
    assert not tight.kept_weights
    assert not make_plan(problem(), 10_000, "cuda:0").kept_weights
    found.saved_only = True
    assert not make_plan(found, 10_000, "cpu").kept_weights


def test_what_the_host_has_no_room_for_stays_on_the_device() -> None:
    points = (KEEP, replace(AWAY, offloaded_bytes=90, backward_transient_bytes=60), LEAST)
    everything, none = problem(points=points), problem(points=points, host=0)
    limit = everything.total(least_points(everything))[0] + 60
    assert any(p.offloaded_bytes for p in choose_points(everything, limit))
    chosen = choose_points(problem(points=points, host=180), limit)
    assert sum(p.offloaded_bytes for p in chosen) <= 180
    assert not any(p.offloaded_bytes for p in choose_points(none, limit))
    away = [points[1]] * 6
    assert none.total(away)[0] == everything.total(away)[0] + 540
    assert none.total(away)[1]["no room on the host"] == 540
