"""Which of the two ways each direction of an attention takes, by measurement on its own layout.

Both ways run forward and backward on random operands with a causal mask. What counts is the time on the device, with a queue that is
full: chunks are many launches, of which a step that waits for the host would see more. What is chosen must be as near to float32 as the
chunks are. On an H200, softcap attention with 256 columns (b2, 8 heads on 4, s4096): forward 0.70 ms over chunks and 0.52 by
FlexAttention, backward 1.55 and 2.65.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from .._torch import sleep_on_device
from ..validation import LIMITS, apart, error_ratio
from . import flex, ways
from .blocks import blocks_of, narrowed
from .flex import BACKWARD, FORWARD, Request
from .softmax import Softmax, softmax_of
from .ways import CHUNKS, FLEX, Kept, Operands, Ready

log = logging.getLogger("fxfuse")
MEASURE = "measure"
# Another way has to be faster by this: what is measured twice differs as much.
CLEARLY_FASTER = 0.95
ROUNDS = 5
# Clock cycles for which the device is kept busy while a run is handed to it: about 5 ms.
HEAD_START = 10_000_000


@dataclass(frozen=True)
class Choice:
    """Which way each direction takes, and in words why."""

    ways: Mapping[str, str]
    words: str

    def __str__(self) -> str:
        taken = [direction for direction, way in self.ways.items() if way == FLEX]
        if len(taken) == 1:
            return f"FlexAttention {taken[0]}, chunks of queries"
        return "FlexAttention" if taken else "chunks of queries"


def told() -> str:
    """"chunks", "flex", "measure" or nothing, as ``FXFUSE_ATTENTION`` says."""
    return _known(os.environ.get("FXFUSE_ATTENTION", ""))


@lru_cache(maxsize=8)
def _known(said: str) -> str:
    if said in ("", CHUNKS, FLEX, MEASURE):
        return said
    log.warning("FXFUSE_ATTENTION=%s says nothing (%s, %s and %s do): attention goes as if it were unset", said, CHUNKS, FLEX, MEASURE)
    return ""


def why_not_flex(text: str, scores: str, dtype: torch.dtype, device: torch.device) -> str:
    """Why a site goes over chunks whatever is measured, or nothing."""
    softmax = softmax_of(text, scores)
    if softmax is None or softmax.mask is None:
        return "its weights are no softmax of a function of single scores and a mask"
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return "FlexAttention is used for 16-bit operands on a GPU"
    return "as FXFUSE_ATTENTION says" if told() == CHUNKS else ""


def measured(requests: Mapping[str, Request]) -> Choice:
    """The choice for a layout, for kernels that have been compiled; a direction without one goes over chunks."""
    first = requests[FORWARD] if FORWARD in requests else next(iter(requests.values()))
    softmax = softmax_of(first.text, first.scores)
    assert softmax is not None
    device = first.forms[0].device
    with apart(), torch.no_grad(), torch.autocast(device.type, enabled=False):
        case = Case.of(first, softmax)
        found = {FORWARD: CHUNKS, BACKWARD: CHUNKS}
        words = []
        for direction, runs in case.runs({d: case.ready(r) for d, r in requests.items()}).items():
            times = {way: milliseconds(run) for way, run in runs.items()}
            words.append(f"{direction} " + ", ".join(f"{way} {ms:.2f} ms" for way, ms in times.items()))
            if times.get(FLEX, float("inf")) < CLEARLY_FASTER * times[CHUNKS]:
                found[direction] = FLEX
        said = "; ".join(words)
        if FLEX in found.values():
            worst = case.worst_ratio(requests, found)
            if worst > LIMITS[first.forms[0].dtype]:
                return Choice(dict.fromkeys(found, CHUNKS), f"{said}; FlexAttention's errors are {worst:.1f} times as large")
    return Choice(found, said)


Run = Callable[[], object]


@dataclass
class Case:
    """Random operands of a layout's forms, and a causal mask."""

    text: str
    scores: str
    softmax: Softmax
    operands: Operands
    mask: Tensor
    arriving: Tensor

    @classmethod
    def of(cls, asked: Request, softmax: Softmax) -> Case:
        device = asked.forms[0].device
        generator = torch.Generator(device).manual_seed(11)
        query, key, value = (form.made().normal_(generator=generator) for form in asked.forms[:3])
        arriving = torch.randn(query.shape[0], query.shape[2], query.shape[1], value.shape[3], generator=generator, device=device,
                               dtype=query.dtype).transpose(1, 2)
        return cls(asked.text, asked.scores, softmax, (query, key, value), cls._mask(asked, softmax), arriving)

    @staticmethod
    def _mask(asked: Request, softmax: Softmax) -> Tensor:
        """Causal, laid out as the layout's."""
        assert softmax.mask is not None
        form, hides = asked.forms[-1], softmax.mask.hides
        queries, keys = form.shape[2:]
        hidden = torch.ones(queries, keys, dtype=torch.bool, device=form.device).triu(1 + keys - queries)
        values = hidden == hides if hides is not None else \
            torch.zeros((), dtype=form.dtype, device=form.device).masked_fill(hidden, torch.finfo(form.dtype).min)  # fmt: skip
        shape = [1 if stride == 0 else size for size, stride in zip(form.shape[:2], form.strides[:2], strict=True)]
        made = torch.empty_strided((*shape, queries, keys), form.strides, dtype=form.dtype, device=form.device).copy_(values)
        varies = softmax.program.arguments[softmax.mask.position].rows
        return made.expand(*(size if varies[dim] else 1 for dim, size in enumerate(form.shape[:2])), -1, -1)

    def ready(self, asked: Request) -> Ready:
        blocks = blocks_of(narrowed(self.mask), self.softmax.mask.hides)  # type: ignore[union-attr]
        return Ready(flex.compiled(asked), blocks, flex.expanded(self.mask, *self.operands[:2]))

    def runs(self, ready: Mapping[str, Ready]) -> dict[str, dict[str, Run]]:
        """What is timed, by direction and way."""
        named = (self.text, self.scores)
        kept = ways.forward_by_chunks(*named, self.operands, self.mask)
        forward: dict[str, Run] = {CHUNKS: partial(ways.forward_by_chunks, *named, self.operands, self.mask)}
        backward: dict[str, Run] = {CHUNKS: partial(ways.backward_by_chunks, *named, self.arriving, self.operands, self.mask, kept)}
        if FORWARD in ready:
            forward[FLEX] = partial(ways.forward_by_flex, ready[FORWARD], self.operands)
        if BACKWARD in ready:
            backward[FLEX] = partial(ways.backward_by_flex, ready[BACKWARD], self.arriving, self.operands, kept)
        return {FORWARD: forward, BACKWARD: backward}

    def worst_ratio(self, requests: Mapping[str, Request], taken: Mapping[str, str]) -> float:
        """The largest error of the result and the gradients over that of chunks alone, in the part whose truth is computed."""
        truth = self._truth()
        only = self._results(requests, dict.fromkeys(taken, CHUNKS))
        return max(error_ratio(a, b, t) for a, b, t in zip(self._results(requests, taken), only, truth, strict=True))

    def _results(self, requests: Mapping[str, Request], taken: Mapping[str, str]) -> list[Tensor]:
        named = (self.text, self.scores)
        kept: Kept = ways.forward_by_flex(self.ready(requests[FORWARD]), self.operands) if taken[FORWARD] == FLEX else \
            ways.forward_by_chunks(*named, self.operands, self.mask)  # fmt: skip
        if taken[BACKWARD] == FLEX:
            gradients = ways.backward_by_flex(self.ready(requests[BACKWARD]), self.arriving, self.operands, kept)
        else:
            gradients = ways.backward_by_chunks(*named, self.arriving, self.operands, self.mask, kept)
        return [t[:1, : self._group() if i < 2 else 1] for i, t in enumerate([kept[0], *gradients])]

    def _group(self) -> int:
        """Query heads to a key/value head."""
        return self.operands[0].shape[1] // self.operands[1].shape[1]

    def _truth(self) -> list[Tensor]:
        """Of the first batch entry, the first key/value head and the query heads that share it: dense and in float32."""
        counts = (self._group(), 1, 1)
        leaves = [t.detach()[:1, :n].float().requires_grad_() for t, n in zip(self.operands, counts, strict=True)]
        mask = self.mask[:1, :1]
        hidden = mask < 0 if mask.is_floating_point() else mask.eq(self.softmax.mask.hides)  # type: ignore[union-attr, arg-type]
        with torch.enable_grad():
            logits = self.softmax.score_function()(torch.matmul(leaves[0], leaves[1].transpose(2, 3)), *[torch.zeros(())] * 4)
            out = torch.matmul(logits.masked_fill(hidden, float("-inf")).softmax(-1), leaves[2])
            return [out.detach(), *torch.autograd.grad(out, leaves, self.arriving[:1, : self._group()].float())]


def milliseconds(run: Run) -> float:
    """The median time on the device, whose queue is never empty meanwhile."""
    run()
    events = []
    for _ in range(ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        sleep_on_device(HEAD_START)
        start.record()
        run()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)[ROUNDS // 2]
