"""A model under a memory budget, while it runs: when to plan, what for, and what became of it.

The first step runs at the points that save least, and tells what every graph needs. The next forward starts with a plan. From then on
each forward starts with a look at what was measured: a longer batch, optimizer state that was not there, a peak that differs from the
prediction by more than 5% lead to another plan; only ever here, while no backward is outstanding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, finalize, ref

import torch
from torch import nn

from fxfuse.capture.checkpoint_flags import without_checkpointing
from fxfuse.capture.declines import observed
from fxfuse.capture.device_memory import Readings, read, watch_optimizers, wide_bytes
from fxfuse.capture.held_by_others import Seen
from fxfuse.capture.step_shape import Shape, shape_of, sizes_for
from fxfuse.kernels import room
from fxfuse.memory.budget import Budget
from fxfuse.memory.costs import rates_of
from fxfuse.memory.dequantized import Dequantized
from fxfuse.memory.offload_runtime import host_pool
from fxfuse.memory.plan import LEAST_IN_TILES, MemoryPlan, size_text
from fxfuse.memory.planner import (
    BudgetTooSmall,
    Group,
    Outside,
    Problem,
    choose_points,
    corrected,
    fastest_plan,
    frontier,
    least_points,
    make_plan,
)
from fxfuse.memory.points import Block, Survey
from fxfuse.memory.surveys import surveys_under

if TYPE_CHECKING:
    from fxfuse.capture.dispatcher import Dispatcher

logger = logging.getLogger("fxfuse")

WRONG = 0.05  # of the measured peak: by so much a prediction is wrong, and another plan is made
MARGIN, AUTO_MARGIN = 0.01, 0.05  # of the budget, left free
UNMEASURED, MOST_UNMEASURED = 0.015, 112 << 20  # of the budget, and bytes: as much more before a plan was measured
FIRST_STEP = 192 << 20  # bytes that a first step takes beyond: libraries' workspaces, data that is read between launches that are timed
_MOST_CORRECTIONS = 4
_governors: WeakKeyDictionary[nn.Module, ref[Governor]] = WeakKeyDictionary()  # an installation owns each, and goes with its model


class _Pending:
    """Lives as long as the autograd graph of a forward; ``over`` once its backward has come to the first block."""

    def __init__(self, governor: Governor) -> None:
        self.over, self.governor = False, ref(governor)

    def __call__(self, gradients: object) -> None:
        self.over = True
        governor = self.governor()
        if governor is not None and governor._judged.steps < 2:
            governor.held.backward(governor.model(), governor.device, governor.shape)


@dataclass
class _Judged:
    """How far the judgement of a plan has come: steps since it was made. The first compiles; the second is measured."""

    steps: int = 0
    corrections: int = 0


class Governor:
    """``blocks``: dispatchers of the blocks, in the order of the forward, with their paths; ``entries``: the modules that call them."""

    def __init__(self, model: nn.Module, budget: Budget, blocks: Sequence[tuple[str, Dispatcher]],
                 entries: Sequence[nn.Module]) -> None:
        self.model = ref(model)
        self.budget = budget
        self.blocks = list(blocks)
        self.dispatchers = dict(self.blocks)
        self.entries = [ref(entry) for entry in entries]
        self.device = next((p.device for p in model.parameters() if p.device.type == "cuda"), torch.device("cpu"))
        self.plan: MemoryPlan | None = None
        self.notes: dict[str, None] = {}
        self.errors: dict[str, None] = {}
        self.shape: Shape | None = None  # of the forward that runs
        self.planned: Shape | None = None
        self.outside = Outside()
        self.accumulating = False
        self.least_checked: set[int] = set()
        self._pending: list[ref[_Pending]] = []
        self._marked = False
        self._depth = 0
        self._blocks_run = 0  # while there is no plan
        self._judged = _Judged()
        self._growths = 0
        self._known_state: int | None = None
        self.held = Seen()
        self._readings = Readings()
        self.kept = Dequantized([dispatcher.module for _, dispatcher in blocks], self.device)
        if self.device.type != "cuda":
            self.notes["memory: this is no CUDA device, so the budget is one of bytes saved for the backward, beyond all else"] = None
        else:
            budget.resolve(self.device)  # a budget above the device is an error now
            rates_of(self.device)  # measured now, on a device that does nothing else
            finalize(self, room.limit, self.device, None, id(self))
        watch_optimizers()
        for entry in entries:
            _governors[entry] = ref(self)

    def forward(self, module: nn.Module, run: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A forward of the module that calls the blocks: plan first, if need be; checkpointing is off meanwhile."""
        if not self._depth and module is self.entries[0]():
            self._begin(args, kwargs)
        self._depth += 1
        try:
            with without_checkpointing(module, kwargs) as (kwargs, switched_off):
                if switched_off:
                    self.notes[f"memory: {switched_off}; the plan decides what is computed again"] = None
                return run(*args, **kwargs)
        finally:
            self._depth -= 1

    def ran(self, dispatcher: Dispatcher, out: Any) -> None:
        """A block or the head has run in a call that trains: its graph's needs are known now."""
        if not self._marked and dispatcher.kind.role in ("block", "whole"):
            self._mark(out)
        if self.plan is None:
            self._look_at_first(dispatcher)

    def _look_at_first(self, dispatcher: Dispatcher) -> None:
        """A module has run in a step that there is no plan for. The first block may have a graph of its own (its input needs no
        gradient), so what the others are is known when the second has run."""
        found = surveys_under(dispatcher.module)
        new = {id(survey) for survey in found} - self.least_checked
        for survey in found:
            survey.reference = survey.reference or self.shape
        self.least_checked |= new
        self._blocks_run += dispatcher.kind.role in ("block", "whole")
        known = self._blocks_run > 1 or all(self._survey(block) is not None for _, block in self.blocks)
        if known and (new or self._blocks_run == 2):
            self._check_least()

    def _mark(self, out: Any) -> None:
        """From now until the backward has come back here, or the graph is gone, a backward is outstanding."""
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                pending = _Pending(self)
                value.grad_fn.register_prehook(pending)
                self._pending.append(ref(pending))
                self._marked = True
                self.held.forward(value, self.shape, known=self.plan is not None)
                return

    def _begin(self, args: tuple, kwargs: dict[str, Any]) -> None:
        last, self.shape = self.shape, shape_of(args, kwargs) or self.shape
        self._marked = False
        self._pending = [p for p in self._pending if (alive := p()) is not None and not alive.over]
        model = self.model()
        if self._pending or self.shape is None or model is None:
            return  # never between a forward and its backward
        self._readings = readings = read(model, self.device)
        self.kept.prune()
        self._look(readings, last)
        if not self.surveys():
            self._static(readings)
            if self.plan is None and self._is_scarce(readings):
                for _, dispatcher in self.blocks:
                    dispatcher.follow(LEAST_IN_TILES)
            return
        reason = self._why_plan(readings)
        if reason:
            self._plan(readings, reason)
        self._judged.steps += 1
        if self._judged.steps == 2 and self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _look(self, readings: Readings, last: Shape | None) -> None:
        """What the last step came to. A smaller batch than was planned for says nothing, unless it took more."""
        if self.plan is None or self.planned is None or last is None or self._judged.steps != 2 or self.device.type != "cuda":
            return
        if last.tokens >= self.planned.tokens or readings.peak > self.plan.predicted_peak:
            self.plan.measured_peak = readings.peak
        else:
            self._judged.steps = 1  # the next step is measured

    def _why_plan(self, readings: Readings) -> str:
        """Why another plan is needed, or nothing."""
        assert self.shape is not None
        if self.plan is None or self.planned is None:
            return "the first step has shown what each graph needs"
        if readings.gradients and not self.accumulating:
            return "gradients are still there when a forward begins"
        if self.shape.tokens > self.planned.tokens or self.shape.length > self.planned.length:
            return f"a batch of {self.shape} is larger than what was planned for"
        if readings.optimizer != self._known_state and readings.optimizer and self._known_state is None:
            expected = self.outside.static.get("optimizer state (expected)", 0)
            if abs(readings.optimizer - expected) > 0.01 * self.plan.budget:
                return "the optimizer's state is there now, and is not what was expected"
        measured = self.plan.measured_peak or 0
        if self._judged.steps == 2 and measured > self.plan.budget and self._judged.corrections < _MOST_CORRECTIONS:
            return f"the peak was {size_text(measured)}, above the budget"
        error = self.plan.error
        if self._judged.steps == 2 and error is not None and abs(error) > WRONG and self._judged.corrections < _MOST_CORRECTIONS:
            return f"the peak was {size_text(measured)}, predicted were {size_text(self.plan.predicted_peak)}"
        return ""

    def _plan(self, readings: Readings, reason: str) -> None:
        former, difference = self.plan, 0
        if former is not None and former.measured_peak and self._judged.steps == 2:
            difference = (former.measured_peak or 0) - former.predicted_peak
            self._judged.corrections += 1
        self.accumulating = self.accumulating or bool(readings.gradients)
        unexplained = self.outside.static.get("not explained", 0)
        self._static(readings)
        self.outside = corrected(self.outside, unexplained + difference)
        assert self.shape is not None
        if self.planned is not None and self.shape.tokens > self.planned.tokens:
            self._growths += 1
        shapes = [*([self.shape.grown(1.15)] if self._growths > 1 else []), self.shape]  # one to grow into, if that fits
        problem, plan = self._planned_for(shapes, *self._limit(readings))
        plan.frontier = frontier(problem)
        plan.notes = [f"planned at {self.planned}, because {reason}"]
        logger.info("memory plan (%s): %s predicted of %s", reason, size_text(plan.predicted_peak), size_text(plan.budget))
        self.plan, self._judged.steps = plan, 0
        self.kept.follow(plan, problem)
        for (_, dispatcher), block in zip(self.blocks, plan.blocks, strict=True):
            dispatcher.follow(block.point.text)

    def _planned_for(self, shapes: Sequence[Shape], budget: int, margin: int) -> tuple[Problem, MemoryPlan]:
        """The plan for the first of the shapes that fits. BudgetTooSmall if nothing was ever planned; else the least is tried."""
        for shape in shapes:
            self.planned = shape
            try:
                return fastest_plan(lambda tiles: self.problem(self.planned, tiles=tiles),  # type: ignore[arg-type]
                                    budget, str(self.device), margin=margin, rates=self._rates())
            except BudgetTooSmall as error:
                failure = error
        if self.plan is None:
            raise failure
        self.errors[f"memory: {failure}; the points that save least are used"] = None
        problem = self.problem(shapes[-1], tiles=self.device.type == "cuda")
        plan = make_plan(problem, problem.total(least_points(problem))[0], str(self.device), rates=self._rates())
        plan.budget = budget
        return problem, plan

    def _is_scarce(self, readings: Readings) -> bool:
        assert self.shape is not None
        budget, margin = self._limit(readings)
        wide = wide_bytes(self.shape.tokens, (dispatcher.module for _, dispatcher in self.blocks))
        return self.device.type == "cuda" and readings.allocated + wide > budget - margin

    def _limit(self, readings: Readings) -> tuple[int, int]:
        """Budget and margin, in bytes."""
        budget = self.budget.resolve(self.device, readings.allocated)
        if self.device.type != "cuda":
            return budget, 0
        room.limit(self.device, budget, id(self))
        measured = self.plan is not None and self.plan.measured_peak
        unsure = 0 if measured else min(int(UNMEASURED * budget), MOST_UNMEASURED)
        return budget, int(budget * (AUTO_MARGIN if self.budget.auto else MARGIN)) + unsure

    def _static(self, readings: Readings) -> None:
        """What lives all the time, from what is allocated now that no graph is."""
        model = self.model()
        if model is None or self.device.type != "cuda":
            return
        inside = {id(p) for _, d in self.blocks for p in d.module.parameters()}
        trained = [p for p in model.parameters() if p.requires_grad and p.device == self.device]
        self._known_state = readings.optimizer or self._known_state
        static = {"weights": readings.weights}
        if readings.optimizer:
            static["optimizer state"] = readings.optimizer
        else:
            static["optimizer state (expected)"] = sum(2 * p.numel() * p.element_size() for p in trained)
        static["other tensors"] = max(readings.allocated - readings.weights - readings.optimizer - readings.gradients
                                     - self.kept.bytes, 0)
        self.outside.static = static
        self.outside.gradients = sum(p.numel() * p.element_size() for p in trained if id(p) not in inside)

    def surveys(self) -> list[tuple[str, str, Survey]]:
        """(path, class, survey) of each block; empty while one of them has not run."""
        found = []
        for path, dispatcher in self.blocks:
            survey = self._survey(dispatcher)
            if survey is None:
                return []
            found.append((path, dispatcher.kind.name, survey))
        return found

    def _survey(self, dispatcher: Dispatcher) -> Survey | None:
        """Of the graphs that ran under a block the one whose batch was most like the present one's."""
        known = surveys_under(dispatcher.module)
        alike = [s for s in known if self.shape is not None and s.reference is not None
                 and (s.reference.rows == 1) == (self.shape.rows == 1)]
        return next(iter(alike or known), None)

    def problem(self, shape: Shape, *, tiles: bool = False) -> Problem:
        """What is to be planned for a batch of this shape, as far as graphs are known."""
        groups: dict[int, Group] = {}
        found: list[Survey] = []
        blocks: dict[int, Block] = {}
        offload = self.device.type == "cuda"
        place = 0
        for path, dispatcher in self.blocks:
            survey = self._survey(dispatcher)
            if survey is None:
                continue
            found.append(survey)
            if id(survey) not in groups:
                single = sum(self._survey(other) is survey for _, other in self.blocks) == 1
                blocks[id(survey)] = survey.block(sizes_for(survey, shape), offload=offload, tiles=tiles, single=single)
                groups[id(survey)] = Group(dispatcher.kind.name, [], [], blocks[id(survey)])
            groups[id(survey)].places.append(place)
            groups[id(survey)].paths.append(path)
            place += 1
        return Problem(list(groups.values()), self._around(shape), self.accumulating, saved_only=self.device.type != "cuda",
                       rates=next((survey.rates for survey in found), None), host=host_pool(True).limit if offload else None)

    def _around(self, shape: Shape) -> Outside:
        """The graphs around the blocks: what they save lives when every block has saved; then the head needs its own."""
        model, outside = self.model(), self.outside
        inside = {id(d.module) for _, d in self.blocks}
        saved = transient = 0
        ms = 0.0
        for module in () if model is None else model.modules():
            for survey in () if id(module) in inside else surveys_under(module)[:1]:
                found = survey.block(sizes_for(survey, shape), offload=False)
                point = found.points[0]
                saved += point.saved_bytes
                transient = max(transient, point.forward_transient_bytes - point.saved_bytes, point.backward_transient_bytes)
                ms += found.forward_ms + found.backward_ms
        return Outside(outside.static, outside.gradients, 0, saved + max(transient, 0), ms, self.held.at(shape))

    def _check_least(self) -> None:
        """Raise before anything is trained, if what is known already cannot fit; let blocks to come use the host, then tiles, if the
        points that save least on the device alone would not fit in the first step."""
        if self.model() is None or self.shape is None:
            return
        problem = self._complete(self.problem(self.shape))
        if not problem.groups:
            return
        budget, margin = self._limit(self._readings)
        room = budget - margin - (FIRST_STEP if self.device.type == "cuda" else 0)
        lowest = problem.start(lambda points: min(points, key=lambda p: (bool(p.choice.offload), p.saved_bytes)))
        if problem.total(lowest)[0] <= room:
            return
        lowest = least_points(problem)
        if problem.total(lowest)[0] > room and not problem.saved_only:
            problem = self._complete(self.problem(self.shape, tiles=True))
            lowest = least_points(problem)
        choose_points(problem, budget - margin)
        for group in problem.groups:
            for path, place in zip(group.paths, group.places, strict=True):
                self.dispatchers[path].follow(lowest[place].text)

    def _complete(self, problem: Problem) -> Problem:
        """With the blocks that have not run, as blocks of a class that has run."""
        missing = [i for i, (_, d) in enumerate(self.blocks) if self._survey(d) is None]
        count = sum(len(group.places) for group in problem.groups)
        for i in missing:  # blocks of a class that has run need what the one that ran needs
            group = next((g for g in reversed(problem.groups) if g.kind == self.blocks[i][1].kind.name), None)
            if group is not None:
                group.places.append(count)
                group.paths.append(self.blocks[i][0])
                count += 1
        return problem

    def _rates(self) -> str:
        return next((survey.rates.name for _, _, survey in self.surveys()), "")


def governed(module: nn.Module, run: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run a forward, under the governor of its model if there is one, the call trains, and its blocks do not all run eager."""
    governor = _of(module)
    if governor is None or not torch.is_grad_enabled() or observed():
        return run(*args, **kwargs)  # (under a transform weights may be tensors without memory, whose bytes nobody can tell)
    return governor.forward(module, run, args, kwargs)


def _of(module: nn.Module) -> Governor | None:
    found = _governors.get(module)
    return None if found is None else found()


def release(model: nn.Module) -> None:
    """Forget the governors of a model's modules."""
    for module in model.modules():
        governor = _of(module)
        _governors.pop(module, None)
        if governor is not None:
            room.limit(governor.device, None, id(governor))
            governor.kept.drop()
