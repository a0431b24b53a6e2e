"""torch's kernel and the library's on one layout of operands: times on the device, and errors against float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..attention.choice import milliseconds
from ..attention.flex import BACKWARD, FORWARD
from ..closeness import error_ratio
from ..validation import LIMITS, apart
from . import library
from .families import Family
from .library import Problem

# Another library has to be faster by this: what is measured twice differs as much.
CLEARLY_FASTER = 0.97
JUDGED = 1024  # queries and keys of the part whose truth is computed


@dataclass(frozen=True)
class Choice:
    """The directions that the library takes, and in words why."""

    taken: frozenset[str]
    words: str


def bytes_of(problem: Problem) -> int:
    """The memory of a trial: operands, result, gradients, sums in float32; or a few matrices of scores of the part that is judged."""
    query, key, value = (math.prod(form.shape) * form.dtype.itemsize for form in problem.forms)
    heads, queries, keys = problem.forms[0].shape[1], problem.forms[0].shape[2], problem.forms[1].shape[2]
    return max(4 * (query + key + value) + 2 * query, 6 * 4 * heads * min(queries, JUDGED) * min(keys, JUDGED))


def measured(problem: Problem, torchs: Family) -> Choice:
    """The choice for a problem. Raises what a kernel raises; OutOfMemoryError where there is no room for a trial."""
    with apart(), torch.no_grad(), torch.autocast(problem.forms[0].device.type, enabled=False):
        query, key, value = _drawn(problem)
        causal, scale = problem.causal, problem.scale
        out, sums, rest = torchs.forward(query, key, value, causal, scale)
        arriving = _arriving(out)
        runs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            FORWARD: (partial(torchs.forward, query, key, value, causal, scale),
                      partial(library.forward, query, key, value, causal, scale)),
            BACKWARD: (partial(torchs.backward, arriving, query, key, value, out, sums, rest, causal, scale),
                       partial(library.backward, arriving, query, key, value, out, sums, causal, scale)),
        }  # fmt: skip
        taken, words = set(), []
        for direction, (its, others) in runs.items():
            ms, other_ms = milliseconds(its), milliseconds(others)
            words.append(f"{direction} torch {ms:.2f} ms, {library.PACKAGE} {other_ms:.2f} ms")
            if other_ms < CLEARLY_FASTER * ms:
                taken.add(direction)
        said = "; ".join(words)
        del out, sums, rest, arriving, runs
    return judged(problem, torchs, frozenset(taken), said)


def judged(problem: Problem, torchs: Family, taken: frozenset[str], said: str) -> Choice:
    """The choice of what is ``taken``, if its errors allow it."""
    with apart(), torch.no_grad(), torch.autocast(problem.forms[0].device.type, enabled=False):
        worst = worst_ratio(problem, torchs) if taken else 0.0
    if worst > LIMITS[problem.forms[0].dtype]:
        return Choice(frozenset(), f"{said}; its errors are {worst:.1f} times as large")
    return Choice(taken, said)


def worst_ratio(problem: Problem, torchs: Family) -> float:
    """The largest error of the library's result and gradients over that of torch's, against float32, on the first rows of each head.

    Both directions are the library's, and each forward's results go to the other's backward as well: one direction alone may be taken.
    """
    query, key, value = (tensor[:1, :, :JUDGED] for tensor in _drawn(problem))
    causal, scale = problem.causal, problem.scale
    out, sums, rest = torchs.forward(query, key, value, causal, scale)
    arriving = _arriving(out)
    base = [out, *torchs.backward(arriving, query, key, value, out, sums, rest, causal, scale)]
    mixed = library.backward(arriving, query, key, value, out, sums, causal, scale)
    out, own = library.forward(query, key, value, causal, scale)
    sums, rest = own.view_as(sums), torchs.rest(query, key)
    ways = [[out, *library.backward(arriving, query, key, value, out, sums, causal, scale)], [out, *mixed],
            [out, *torchs.backward(arriving, query, key, value, out, sums, rest, causal, scale)]]  # fmt: skip
    leaves = [tensor.float().requires_grad_() for tensor in (query, key, value)]
    with torch.enable_grad():
        truth = _dense(leaves[0], leaves[1], leaves[2], causal, scale)
        wanted = [truth.detach(), *torch.autograd.grad(truth, leaves, arriving.float())]
    return max(error_ratio(a, b, t) for way in ways for a, b, t in zip(way, base, wanted, strict=True))


def _drawn(problem: Problem) -> list[Tensor]:
    """Operands, from a generator of their own: the caller's random numbers stay what they are."""
    generator = torch.Generator(problem.forms[0].device).manual_seed(11)
    return [form.made().normal_(generator=generator) for form in problem.forms]


def _arriving(out: Tensor) -> Tensor:
    """A gradient of the result, likewise."""
    return torch.empty_like(out).normal_(generator=torch.Generator(out.device).manual_seed(12))


def _dense(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None) -> Tensor:
    """Attention with every score written down."""
    group = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(group, 1) for tensor in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)) * (query.shape[3] ** -0.5 if scale is None else scale)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).triu(1), float("-inf"))
    return torch.matmul(scores.softmax(-1), value)
