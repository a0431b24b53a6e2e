"""Which of the two ways an attention runs: over chunks of queries, or by FlexAttention where it was measured faster.

Where ``FXFUSE_ATTENTION`` says "measure", both run once for a program, its head sizes and its lengths on a kind of device, forward and
backward on random operands with a causal mask, and FlexAttention's result must be as near to float32 as the chunks' are. The answer is
kept on disk and holds in later runs of this build. It is not asked for unasked: FlexAttention's kernels take half a minute to compile,
and a step takes its chunks a few percent longer. "chunks" and "flex" choose without measuring.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .. import earlier_runs
from ..validation import LIMITS, apart, error_ratio
from . import execution
from .execution import Attention
from .prepared import prepared
from .softmax import Softmax, softmax_of

log = logging.getLogger("fxfuse")
CHUNKS, FLEX, MEASURE = "chunks", "flex", "measure"
UNMEASURED = "FlexAttention has not been measured here; FXFUSE_ATTENTION=measure does it, in about a minute"
# FlexAttention's kernels take so much longer to compile that they have to be faster by this.
CLEARLY_FASTER = 0.95
ROUNDS = 5


@dataclass(frozen=True)
class Sizes:
    """Of an attention: query [batch, heads, queries, width], key [batch, groups, keys, width], value [batch, groups, keys, result]."""

    batch: int
    heads: int
    groups: int
    queries: int
    keys: int
    width: int
    result: int


def why_not_flex(text: str, scores: str, dtype: torch.dtype, device: torch.device) -> str:
    """Why a site cannot go there at all, or nothing."""
    softmax = softmax_of(text, scores)
    if softmax is None or softmax.mask is None:
        return "its weights are no softmax of a function of single scores and a mask"
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return "FlexAttention is used for 16-bit operands on a GPU"
    return ""


def chosen(text: str, scores: str, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
    """("chunks" or "flex", in words why)."""
    reason = why_not_flex(text, scores, dtype, device)
    told = os.environ.get("FXFUSE_ATTENTION", "")
    if reason or told in (CHUNKS, FLEX):
        return (CHUNKS, reason) if reason else (told, "as FXFUSE_ATTENTION says")
    known = _known(text, scores, sizes, dtype, device, told == MEASURE)
    return known or (CHUNKS, UNMEASURED)


@lru_cache(maxsize=64)
def _known(text: str, scores: str, sizes: Sizes, dtype: torch.dtype, device: torch.device, measure: bool) -> tuple[str, str] | None:
    """An earlier answer, or one found out now if it is to be."""
    asked = (text, scores, str(sizes), str(dtype), torch.cuda.get_device_name(device))
    known = earlier_runs.recall("attention", *asked)
    if known is None and measure:
        known = _measure(text, scores, sizes, dtype, device)
        earlier_runs.remember("attention", known, *asked)
    return None if known is None else (known[0], known[1])


def _measure(text: str, scores: str, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> list[str]:
    softmax = softmax_of(text, scores)
    assert softmax is not None
    try:
        with apart(), torch.no_grad(), torch.autocast(device.type, enabled=False):
            operands = _operands(sizes, dtype, device, softmax)
            ways = {name: way(text, scores, operands) for name, way in ((CHUNKS, _by_chunks), (FLEX, _by_flex))}
            found = {name: run() for name, run in ways.items()}
            ratios = [error_ratio(a, b, t) for a, b, t in zip(*(_part(found[n], sizes) for n in (FLEX, CHUNKS)),
                                                               _truth(softmax, sizes, operands), strict=True)]
            times = {name: _milliseconds(run) for name, run in ways.items()}
    except Exception as error:  # Inductor's compilers fail in many ways; the other way is always there
        log.warning("FlexAttention was tried for an attention and is not used: %s: %s", type(error).__name__, str(error)[:300])
        return [CHUNKS, f"FlexAttention failed: {type(error).__name__}"]
    words = f"chunks {times[CHUNKS]:.2f} ms, FlexAttention {times[FLEX]:.2f} ms forward and backward"
    if max(ratios) > LIMITS[dtype]:
        return [CHUNKS, f"{words}, whose errors are {max(ratios):.1f} times as large"]
    return [FLEX if times[FLEX] < CLEARLY_FASTER * times[CHUNKS] else CHUNKS, words]


Run = Callable[[], list[Tensor]]


def _operands(sizes: Sizes, dtype: torch.dtype, device: torch.device, softmax: Softmax) -> list[Tensor]:
    """Query, key, value, mask and the gradient that arrives, as projections and models lay them out."""
    generator = torch.Generator(device).manual_seed(11)

    def drawn(length: int, heads: int, width: int) -> Tensor:
        return torch.randn(sizes.batch, length, heads, width, generator=generator, device=device, dtype=dtype).transpose(1, 2)

    hidden = torch.ones(sizes.queries, sizes.keys, dtype=torch.bool, device=device).triu(1 + sizes.keys - sizes.queries)
    assert softmax.mask is not None
    hides, argument = softmax.mask.hides, softmax.program.arguments[softmax.mask.position]
    kind = getattr(torch, argument.dtype)
    least = torch.zeros(1, dtype=kind, device=device).masked_fill(hidden, torch.finfo(kind).min) if hides is None else None
    mask = (hidden == hides) if least is None else least
    return [drawn(sizes.queries, sizes.heads, sizes.width), drawn(sizes.keys, sizes.groups, sizes.width),
            drawn(sizes.keys, sizes.groups, sizes.result), mask.expand(sizes.batch, 1, -1, -1).contiguous(),
            drawn(sizes.queries, sizes.heads, sizes.result)]


def _by_chunks(text: str, scores: str, operands: list[Tensor]) -> Run:
    query, key, value, mask, arriving = operands

    def run() -> list[Tensor]:
        call = Attention(query, key, value, [mask], prepared(text, scores))
        out, *statistics = execution.forward(call)
        return [out, *execution.backward(call, arriving, statistics)]

    return run


def _by_flex(text: str, scores: str, operands: list[Tensor]) -> Run:
    from .flex_op import flex_attention, flex_attention_backward

    query, key, value, mask, arriving = operands

    def run() -> list[Tensor]:
        out, *numbers = flex_attention(query, key, value, mask, text, scores)
        return [out, *flex_attention_backward(arriving, query, key, value, mask, out, *numbers, text, scores)]

    return run


def _part(tensors: list[Tensor], sizes: Sizes) -> list[Tensor]:
    """Of the first batch entry, the first key/value head and the query heads that share it."""
    group = sizes.heads // sizes.groups
    return [t[:1, : group if i < 2 else 1] for i, t in enumerate(tensors)]


def _truth(softmax: Softmax, sizes: Sizes, operands: list[Tensor]) -> list[Tensor]:
    """The same part, dense and in float32."""
    query, key, value, mask, arriving = operands
    group = sizes.heads // sizes.groups
    leaves = [t.detach()[:1, :n].float().requires_grad_() for t, n in ((query, group), (key, 1), (value, 1))]
    hidden = mask[:1] < 0 if mask.is_floating_point() else mask[:1] == softmax.mask.hides  # type: ignore[union-attr]
    with torch.enable_grad():
        whole = softmax.score_function()(torch.matmul(leaves[0], leaves[1].transpose(2, 3)), *[torch.zeros(())] * 4)
        out = torch.matmul(whole.masked_fill(hidden, float("-inf")).softmax(-1), leaves[2])
        return [out.detach(), *torch.autograd.grad(out, leaves, arriving[:1, :group].float())]


def _milliseconds(run: Run) -> float:
    """The median time on the device."""
    events = []
    for _ in range(ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)[ROUNDS // 2]


