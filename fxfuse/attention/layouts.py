"""Which way a layout of operands takes, from one training step to the next.

A layout begins over chunks. Where it has come in a second step and FlexAttention could save more in 200 steps than trying it costs, a
process beside this one compiles its kernels (beside.py); when that is done, both ways are timed (choice.py), and the layout takes what
was faster from then on. What was found out is kept on disk, and later runs begin with it.

Everything here moves on only behind an optimizer's step and outside of any backward: what ran forward before has run backward by then,
and a checkpoint is replayed by the kernels of its forward.

``FXFUSE_ATTENTION``: "chunks" and "flex" decide (the kernels of the first layouts are then compiled where they are first needed),
"measure" compiles in this process behind the second step, whatever could be saved.
"""

from __future__ import annotations

import functools
import logging
import os
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import earlier_runs
from .._torch import inductor_cache_dir
from ..between_steps import behind_each_step, is_between_steps
from ..reporting.records import Site
from . import beside, choice, flex, ways
from .beside import Beside
from .blocks import blocks_of, narrowed
from .choice import MEASURE, Choice, told
from .execution import Attention
from .flex import BACKWARD, FORWARD, Form, Kernel, Request
from .known_masks import once_for_mask
from .prepared import prepared
from .softmax import softmax_of
from .ways import CHUNKS, FLEX, Operands, Ready

log = logging.getLogger("fxfuse")
# Layouts that are counted, and of one program those that are compiled: batches whose lengths differ would never end compiling.
MOST_COUNTED, MOST_COMPILED = 4096, 4
# Trying FlexAttention is worth what it saves in so many steps; it costs the training about so many seconds.
STEPS, COST = 200, 1.0
# What a forward can save, in seconds for each operation of a causal mask: the difference of both ways' rates on an H200.
SAVED_PER_FLOP = 1 / 196e12 - 1 / 264e12


@dataclass(eq=False)
class Layout:
    """Operands of one form, under one program.

    forms: of query, key, value and mask   flops: of a forward   began: the step in which it first came
    calls: forwards in this step   total: in all steps   wanted: its kernels are noted as calls come
    requests, kernels: by direction, and whether blocks follow each other   choice: once it is made
    at_once: kernels are compiled where they are first needed: an earlier run compiled them, or it was told so
    failed: kernels that were not compiled
    """

    text: str
    scores: str
    device: torch.device
    forms: tuple[Form, ...]
    flops: float
    began: int
    calls: int = 0
    total: int = 0
    wanted: bool = False
    at_once: bool = False
    requests: dict[tuple[str, bool], Request] = field(default_factory=dict)
    kernels: dict[tuple[str, bool], Kernel] = field(default_factory=dict)
    failed: set[Request] = field(default_factory=set)
    choice: Choice | None = None

    @property
    def saved(self) -> float:
        """Seconds that FlexAttention could save in so many steps like those since it first came."""
        return STEPS * SAVED_PER_FLOP * self.flops * self.total / max(_now.steps - self.began, 1)

    @property
    def lacking(self) -> list[Request]:
        """Kernels to be compiled beside the training: all, where nothing is chosen and both directions are noted; or further ones."""
        if self.choice is None:
            noted = {direction for direction, _ in self.requests} == {FORWARD, BACKWARD}
            return list(self.requests.values()) if self.wanted and noted else []
        return [asked for key, asked in self.requests.items() if self.choice.ways[key[0]] == FLEX
                and key not in self.kernels and asked not in self.failed and not self.at_once]

    def asked(self) -> tuple[str, ...]:
        """What an answer on disk is found by."""
        forms = [(form.shape, form.strides, str(form.dtype)) for form in self.forms]
        return self.text, self.scores, str(forms), torch.cuda.get_device_name(self.device)


@dataclass
class _Now:
    """Of this process: optimizer steps since the first layout came, what is compiled beside it, and for which layouts."""

    steps: int = 0
    beside: Beside | None = None
    trying: tuple[Layout, ...] = ()


_now = _Now()
_layouts: dict[tuple, Layout] = {}
_compiled: Counter[str] = Counter()
_sites: dict[str, list[weakref.ref[Site]]] = {}


def ready(direction: str, text: str, scores: str, operands: Operands, mask: Tensor) -> Ready | None:
    """FlexAttention for a call on query, key and value; None: it goes over chunks."""
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    given, mask = mask, narrowed(mask if mask.dim() == 4 else mask[(None,) * (4 - mask.dim())])
    layout = _layout(text, scores, operands, mask)
    if layout is None:
        return None
    if direction == FORWARD and layout.choice is None:
        layout.calls += 1
    if not layout.wanted and (layout.choice is None or layout.choice.ways[direction] == CHUNKS):
        return None
    softmax = softmax_of(text, scores)
    assert softmax is not None
    assert softmax.mask is not None
    blocks = blocks_of(mask, softmax.mask.hides)
    if not blocks.usable:
        return None
    if direction == FORWARD and layout.choice is not None and layout.choice.ways[BACKWARD] == CHUNKS:
        # The host waits anew for the blocks: what the backward asks of the mask is read in the same breath, not in the middle of it.
        once_for_mask(mask, ("chunks", operands[0].shape), lambda: len(Attention(*operands, [given], prepared(text, scores)).seen))
    whole = flex.expanded(mask, *operands[:2])
    key = direction, blocks.contiguous
    if key not in layout.requests:
        layout.requests[key] = flex.request(direction, text, scores, ways.forms(direction, operands), blocks, Form.of(whole))
    if layout.choice is not None and layout.at_once and key not in layout.kernels:
        layout.kernels[key] = flex.compiled(layout.requests[key])
    return Ready(layout.kernels[key], blocks, whole) if layout.choice is not None and key in layout.kernels else None


def _layout(text: str, scores: str, operands: Operands, mask: Tensor) -> Layout | None:
    query, key, value = operands
    found = (text, scores, query.shape, query.stride(), key.shape, key.stride(), value.shape, value.stride(), mask.shape, mask.stride(),
             query.dtype, mask.dtype, query.device)
    layout = _layouts.get(found)
    if layout is None and len(_layouts) < MOST_COUNTED:
        watch_optimizers()
        forms = tuple(map(Form.of, (*operands, mask)))
        b, heads, queries, width = query.shape
        flops = b * heads * queries * key.shape[2] * (width + value.shape[3])  # half of a matrix's, the mask being causal
        layout = _layouts[found] = Layout(text, scores, query.device, forms, flops, _now.steps)
        _begin(layout)
    return layout


def _begin(layout: Layout) -> None:
    """With what is told, or was found out earlier."""
    if told() == FLEX:
        if _compiled[layout.text] < MOST_COMPILED:
            layout.at_once = True
            _settle(layout, Choice({FORWARD: FLEX, BACKWARD: FLEX}, "as FXFUSE_ATTENTION says"))
        return
    known = earlier_runs.recall("attention", *layout.asked()) if layout.device.type == "cuda" else None
    if known is not None and (FLEX not in known[:2] or known[3] == _kernels_on_disk()):
        layout.at_once = True
        _settle(layout, Choice({FORWARD: known[0], BACKWARD: known[1]}, known[2]))


def _kernels_on_disk() -> list[str | int]:
    """The folder where Inductor keeps kernels; another one in its place is another."""
    folder = inductor_cache_dir()
    return [folder, os.stat(folder).st_ino]


def _settle(layout: Layout, made: Choice) -> None:
    layout.choice, layout.wanted = made, False
    _compiled[layout.text] += FLEX in made.ways.values()
    log.info("attention %s: %s (%s)", layout.forms[0].shape, made, made.words)
    for reference in _sites.get(layout.text, ()):
        site = reference()
        if site is not None:
            _say(site, made)


def tell(text: str, site: Site) -> None:
    """Have a site of a report say what its layouts take, now and later."""
    _sites.setdefault(text, []).append(weakref.ref(site))
    for layout in _layouts.values():
        if layout.text == text and layout.choice is not None:
            _say(site, layout.choice)


def _say(site: Site, made: Choice) -> None:
    site.implementation, site.reason = str(made), made.words


@functools.cache
def watch_optimizers() -> None:
    behind_each_step(after_step)


def after_step() -> None:
    """Behind an optimizer's step: count, take up what was compiled, ask for what is worth it."""
    if not is_between_steps():
        return
    _now.steps += 1
    for layout in _layouts.values():
        if layout.calls:
            layout.total, layout.calls = layout.total + layout.calls, 0
            worth = told() == MEASURE or layout.saved > COST
            layout.wanted = worth and layout.choice is None and _compiled[layout.text] < MOST_COMPILED
    if _now.beside is not None and _now.beside.done():
        problems = dict(zip(_now.beside.requests, _now.beside.problems(), strict=True))
        trying, _now.beside, _now.trying = _now.trying, None, ()
        for layout in trying:
            _take_up(layout, problems)
    elif _now.beside is None:
        _ask([layout for layout in _layouts.values() if layout.lacking])


def _ask(layouts: Sequence[Layout]) -> None:
    """Have what these layouts lack compiled."""
    requests = [asked for layout in layouts for asked in layout.lacking]
    if requests and told() == MEASURE:
        for layout in layouts:
            _take_up(layout, dict.fromkeys(requests, ""))
    elif requests and beside.has_room(layouts[0].device):
        try:
            _now.beside, _now.trying = Beside(requests), tuple(layouts)
        except OSError as error:  # no process to be had: they are not asked for again
            for layout in layouts:
                _take_up(layout, dict.fromkeys(requests, f"{type(error).__name__}: {error}"))


def _take_up(layout: Layout, problems: Mapping[Request, str]) -> None:
    """Load what was compiled, and choose where nothing was chosen yet."""
    keys = [key for key, asked in layout.requests.items() if problems.get(asked) == ""]
    layout.failed |= {asked for asked in layout.requests.values() if problems.get(asked)}
    said = next((problems[asked] for asked in layout.failed), "")
    try:
        layout.kernels |= {key: flex.compiled(layout.requests[key]) for key in keys}
        if layout.choice is None:
            by_direction = {direction: layout.requests[direction, contiguous] for direction, contiguous in sorted(keys)}
            found = choice.measured(by_direction) if by_direction else Choice({FORWARD: CHUNKS, BACKWARD: CHUNKS}, "")
            made = Choice(found.ways, "; ".join(filter(None, (found.words, said and f"FlexAttention failed: {said}"))))
            if by_direction:
                answer = [made.ways[FORWARD], made.ways[BACKWARD], made.words, _kernels_on_disk()]
                earlier_runs.remember("attention", answer, *layout.asked())
            _settle(layout, made)
    except Exception as error:  # Inductor's compilers fail in many ways, and memory may be short; the chunks are always there
        log.warning("FlexAttention was tried for an attention and is not used: %s: %s", type(error).__name__, str(error)[:300])
        _settle(layout, Choice({FORWARD: CHUNKS, BACKWARD: CHUNKS}, f"FlexAttention failed: {type(error).__name__}"))
