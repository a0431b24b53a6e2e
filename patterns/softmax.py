"""Softmax over the columns of a row: of scores that may be scaled, capped, masked, and may share their weight with a sink.

Saves its result and nothing else, as long as the scores are not capped.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxfuse.rules import Full, Row, Shared, constant, one_of, pattern

Transform = Callable[[Tensor, float, float], Tensor]


def plain(x: Tensor, scale: float, cap: float) -> Tensor:
    return x


def scaled(x: Tensor, scale: float, cap: float) -> Tensor:
    return scale * x


def capped(x: Tensor, scale: float, cap: float) -> Tensor:
    return cap * torch.tanh(x / cap)


def scaled_and_capped(x: Tensor, scale: float, cap: float) -> Tensor:
    return cap * torch.tanh(scale * x / cap)


SCORES = (plain, scaled, capped, scaled_and_capped)


@pattern
def softmax(
    x: Full, *, scores: Transform = one_of(*SCORES), scale: float = constant(0.125), cap: float = constant(50.0)
) -> Tensor:
    """exp(z) / sum(exp(z))"""
    return torch.softmax(scores(x, scale, cap), -1)


@softmax.also
def masked_softmax(
    x: Full, mask: Shared, *,
    scores: Transform = one_of(*SCORES), scale: float = constant(0.125), cap: float = constant(50.0),
) -> Tensor:
    """softmax(z + mask)"""
    return torch.softmax(scores(x, scale, cap) + mask, -1)


@softmax.also
def log_softmax(
    x: Full, *, scores: Transform = one_of(*SCORES), scale: float = constant(0.125), cap: float = constant(50.0)
) -> Tensor:
    """z - logsumexp(z)"""
    return torch.log_softmax(scores(x, scale, cap), -1)


@softmax.also
def softmax_with_sink(
    x: Full, sink: Row, *, scores: Transform = one_of(*SCORES), scale: float = constant(0.125), cap: float = constant(50.0)
) -> Tensor:
    """exp(z) / (exp(sink) + sum(exp(z)))"""
    z = scores(x, scale, cap)
    top = torch.maximum(z.amax(-1, keepdim=True), sink)
    e = torch.exp(z - top)
    return e / (e.sum(-1, keepdim=True) + torch.exp(sink - top))


@softmax.near_miss("the exponentials are divided by their maximum, not by their sum")
def divided_by_the_maximum(x: Full) -> Tensor:
    e = torch.exp(x)
    return e / e.amax(-1, keepdim=True)


@softmax.near_miss("the rows are not divided by anything")
def unnormalised(x: Full) -> Tensor:
    return torch.exp(x - x.amax(-1, keepdim=True))
