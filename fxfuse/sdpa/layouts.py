"""Which library a layout of SDPA's operands takes, from one training step to the next.

A layout begins with torch's kernel. Where flash-attn-4 could save more than trying it costs, a process beside this one compiles its
kernels and a thread of this one imports it; behind a later optimizer's step both are timed (trial.py), and the layout takes what was
faster from then on. Layouts whose rows are as many up to a factor of 2 share an answer. What was found out is kept on disk: a later
process only imports the library, if it has won anything.

``FXFUSE_SDPA``: "torch" leaves torch's kernels, "measure" imports, compiles and times behind the second step, whatever could be
saved. Where ``torch.use_deterministic_algorithms`` is on, torch's kernels run, and in CUDA graphs: there the library was not tried.
"""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import dataclass, field
from threading import Thread

import torch
from torch import Tensor

from .. import earlier_runs
from ..attention import beside
from ..attention.beside import Beside
from ..attention.flex import FORWARD, Form
from ..between_steps import behind_each_step, is_between_steps
from ..kernels import room
from . import library, trial
from .families import Family
from .library import Problem
from .trial import Choice

log = logging.getLogger("fxfuse")
SETTING, TORCH, MEASURE = "FXFUSE_SDPA", "torch", "measure"
# Layouts that are counted: batches whose lengths differ would never end.
MOST_COUNTED = 4096
# Trying the library is worth what it saves in so many steps; it costs the training about so many seconds, in which its import holds
# Python's lock.
STEPS, COST = 500, 2.5
# What a forward with its backward can save, in seconds for each score: whole steps gained 2.9e-13 (128 columns) and 4.6e-13 (64) on an
# H200, causal, 4096 tokens.
SAVED_PER_SCORE = 3.5e-13


@dataclass(eq=False)
class Layout:
    """Operands of one form, up to a factor of 2 in their rows, and what computes them.

    problem: the first that came   sizes: what all of them have in common
    began: the step in which it first came   calls: forwards in this step   total: in all steps   taken: directions of the library
    recalled: directions in which an earlier process found it faster   choice: once it is made   is_compiled: its kernels, on disk
    """

    problem: Problem
    family: Family
    sizes: tuple
    began: int
    calls: int = 0
    total: int = 0
    taken: frozenset[str] = frozenset()
    recalled: frozenset[str] = frozenset()
    choice: Choice | None = None
    is_compiled: bool = False

    @property
    def saved(self) -> float:
        """Seconds that the library could save in so many steps like those since it first came."""
        return STEPS * SAVED_PER_SCORE * self.problem.scores * self.total / max(_now.steps - self.began, 1)

    @property
    def is_open(self) -> bool:
        """Is it worth the trouble, and nothing settled."""
        return self.choice is None and bool(self.total) and (told() == MEASURE or bool(self.recalled) or self.saved > COST)

    def asked(self) -> tuple[str, ...]:
        """What an answer on disk is found by."""
        query = self.problem.forms[0]
        return (self.family.name, str(torch.backends.cudnn.version()), library.installed(), str(self.sizes), str(query.dtype),
                torch.cuda.get_device_name(query.device))  # fmt: skip


@dataclass
class _Now:
    """Of this process: optimizer steps since the first layout came; what is compiled beside it, for which layouts; who imports."""

    steps: int = 0
    beside: Beside | None = None
    compiling: list[Layout] = field(default_factory=list)
    importing: Thread | None = None


_now = _Now()
_layouts: dict[tuple, Layout | None] = {}
_shared: dict[tuple, Layout] = {}


@functools.lru_cache(maxsize=8)
def _known(said: str) -> str:
    if said in ("", TORCH, MEASURE):
        return said
    log.warning("%s=%s says nothing (%s and %s do): attention goes as if it were unset", SETTING, said, TORCH, MEASURE)
    return ""


def told() -> str:
    """"torch", "measure" or nothing, as ``FXFUSE_SDPA`` says."""
    return _known(os.environ.get(SETTING, ""))


def is_possible() -> bool:
    """Is there another library, and may it be used."""
    return bool(library.installed()) and told() != TORCH


def takes(direction: str, family: Family, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None) -> bool:
    """Does a call go to the library."""
    found = (family.name, query.shape, query.stride(), key.shape, key.stride(), value.shape, value.stride(), causal, scale,
             query.dtype, query.device)
    try:
        layout = _layouts[found]
    except KeyError:
        layout = _layout(found, family, (query, key, value), causal, scale)
    if layout is None:
        return False
    if direction == FORWARD and layout.choice is None:
        layout.calls += 1
    if direction not in layout.taken or torch.are_deterministic_algorithms_enabled():
        return False
    return not (query.is_cuda and torch.cuda.is_current_stream_capturing())


def _layout(found: tuple, family: Family, operands: tuple[Tensor, Tensor, Tensor], causal: bool, scale: float | None) -> Layout | None:
    if len(_layouts) >= MOST_COUNTED:
        return None
    _watch_optimizers()
    query, key, value = operands
    problem = Problem((Form.of(query), Form.of(key), Form.of(value)), causal, scale)
    if library.why_not(problem):
        _layouts[found] = None
        return None
    b, heads, queries, width = query.shape
    sizes = (b.bit_length(), queries.bit_length(), key.shape[2].bit_length(), heads, key.shape[1], width, value.shape[3],
             _order(query), _order(key), _order(value), causal, scale)
    shared = (family.name, sizes, query.dtype, query.device)
    layout = _shared.get(shared)
    if layout is None:
        layout = _shared[shared] = Layout(problem, family, sizes, _now.steps)
        _begin(layout)
    _layouts[found] = layout
    return layout


def _order(tensor: Tensor) -> tuple[int, ...]:
    """The dimensions as they lie in memory."""
    return tuple(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))


def _begin(layout: Layout) -> None:
    """With what was found out earlier."""
    known = earlier_runs.recall("sdpa", *layout.asked()) if told() != MEASURE else None
    if known is not None:
        layout.recalled, layout.is_compiled = frozenset(known[0]), True
        if not layout.recalled:
            layout.choice = Choice(layout.recalled, known[1])


@functools.cache
def _watch_optimizers() -> None:
    behind_each_step(after_step)


def after_step() -> None:
    """Behind an optimizer's step: count, go on with what was begun, settle what can be settled."""
    if not is_between_steps():
        return
    _now.steps += 1
    for layout in _shared.values():
        layout.total, layout.calls = layout.total + layout.calls, 0
    waiting = [layout for layout in _shared.values() if layout.is_open]
    if _now.beside is not None and _now.beside.done():
        _take_up()
    elif waiting and _now.beside is None:
        _go_on(waiting)


def _go_on(waiting: list[Layout]) -> None:
    """Compile beside what is not compiled yet; import; settle."""
    if told() == MEASURE:
        for layout in waiting if _now.steps > 1 else ():
            _settle(layout)
        return
    lacking = [layout for layout in waiting if not layout.is_compiled]
    ready = [layout for layout in waiting if layout.is_compiled]
    if lacking and beside.has_room(lacking[0].problem.forms[0].device):
        try:
            _now.beside, _now.compiling = Beside([layout.problem for layout in lacking], library.compiled), lacking
        except OSError as error:  # no process to be had: they are not asked for again
            for layout in lacking:
                _leave(layout, error)
    if ready and library.is_loaded() and (_now.importing is None or not _now.importing.is_alive()):
        for layout in ready:
            _settle(layout)
    elif ready and _now.importing is None:
        # Not a daemon: a process that ends in the middle of this waits for it, as libraries that are half loaded do not end well.
        _now.importing = Thread(target=_import, name="fxfuse: import of flash-attn-4", daemon=False)
        _now.importing.start()


def _import() -> None:
    try:
        library.load()
    except Exception as error:  # a package that does not fit this machine fails in any way
        for layout in [layout for layout in list(_shared.values()) if layout.choice is None]:
            _leave(layout, error)


def _take_up() -> None:
    """What was compiled beside this process."""
    assert _now.beside is not None
    problems = _now.beside.problems()
    for layout, problem in zip(_now.compiling, problems, strict=True):
        layout.is_compiled = True
        if problem:
            _choose(layout, Choice(frozenset(), f"{library.PACKAGE} failed: {problem}"), keep=False)
    _now.beside, _now.compiling = None, []


def _settle(layout: Layout) -> None:
    """Time both, or judge once more what an earlier process has found faster; later, where a plan leaves no room for that now."""
    problem, family = layout.problem, layout.family
    if not room.is_there(trial.bytes_of(problem), problem.forms[0].device):
        return
    try:
        if layout.recalled:
            _choose(layout, trial.judged(problem, family, layout.recalled, "as an earlier process found"), keep=False)
        else:
            _choose(layout, trial.measured(problem, family), keep=True)
    except Exception as error:  # compilers fail in many ways, and memory may be short; torch's kernels are always there
        _leave(layout, error)


def _leave(layout: Layout, error: Exception) -> None:
    log.warning("%s was tried for an attention and is not used: %s: %s", library.PACKAGE, type(error).__name__, str(error)[:300])
    _choose(layout, Choice(frozenset(), f"{library.PACKAGE} failed: {type(error).__name__}"), keep=False)


def _choose(layout: Layout, made: Choice, keep: bool) -> None:
    layout.choice, layout.taken = made, made.taken
    log.info("scaled_dot_product_attention %s: %s (%s)", layout.problem.forms[0].shape, sorted(made.taken) or TORCH, made.words)
    if keep:
        earlier_runs.remember("sdpa", [sorted(made.taken), made.words], *layout.asked())


def sentences() -> list[str]:
    """What a reader of a report should know."""
    found = []
    for layout in _shared.values():
        if layout.choice is not None:
            who = {2: library.PACKAGE, 1: f"{library.PACKAGE} {next(iter(layout.taken), '')}", 0: "torch's kernels"}[len(layout.taken)]
            shape = list(layout.problem.forms[0].shape)
            found.append(f"in this process scaled_dot_product_attention of {shape} runs by {who} ({layout.choice.words})")
    return found
