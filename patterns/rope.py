"""Rotary position embedding, alone and in one pass with the norm of queries and keys.

Each pair of columns (two halves, or neighbours) is turned by an angle whose cosine and sine are operands. Where pairs lie is a matter
of lanes, which normal forms do not see; so half, interleaved, partial, even-odd-in half-out and complex are one rule. Saves cosine and
sine alone; with the norm, its input and one number a row too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxfuse.rules import Column, Full, HalfPositions, Positions, constant, one_of, pattern

from .norm import Norm, layer, rms, rms_norm

Rotation = Callable[[Tensor, Tensor, Tensor], Tensor]


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + (-x2, x1) * sin with x1, x2 the halves of x; cos and sin as wide as x."""
    x1, x2 = x.chunk(2, -1)
    return x * cos + torch.cat((-x2, x1), -1) * sin


def rotated_in_part(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first half of the columns rotated, the rest as it is."""
    turned, rest = x.chunk(2, -1)
    return torch.cat((rotated(turned, cos.chunk(2, -1)[0], sin.chunk(2, -1)[0]), rest), -1)


@pattern
def rope(x: Full, cos: Positions, sin: Positions) -> Tensor:
    """(x1 cos - x2 sin, x2 cos + x1 sin)"""
    return rotated(x, cos, sin)


@rope.also
def rope_scaled(x: Full, cos: Positions, sin: Positions, *, scale: float = constant(0.7)) -> Tensor:
    """The rotated x times a number: a softmax scale folded into the queries"""
    return rotated(x, cos, sin) * scale


@rope.also
def rope_with_negated_sine(x: Full, cos: HalfPositions, sin: HalfPositions, negated: HalfPositions) -> Tensor:
    """The sine and its negative as two operands, which is how a region sees one that was negated before it"""
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos + x1 * negated), -1)


@rope.near_miss("both halves have the same sign, which is no rotation")
def reflected(x: Full, cos: HalfPositions, sin: HalfPositions) -> Tensor:
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos + x1 * sin), -1)


@rope.near_miss("the halves are not mixed: each is turned by itself")
def unmixed(x: Full, cos: Positions, sin: Positions) -> Tensor:
    return x * cos - x * sin


@pattern(absent={"w": 1, "b": 0})
def qk_norm_rope(
    x: Full, w: Column, b: Column, cos: Positions, sin: Positions, *,
    norm: Norm = one_of(rms, layer), rotation: Rotation = one_of(rotated, rotated_in_part), eps: float = constant(1e-6),
) -> Tensor:
    """rope(norm(x))"""
    return rotation(norm(x, w, b, eps), cos, sin)


@qk_norm_rope.also
def rope_before_the_norm(
    x: Full, w: Column, cos: Positions, sin: Positions, *,
    rotation: Rotation = one_of(rotated, rotated_in_part), eps: float = constant(1e-6),
) -> Tensor:
    """rms_norm(rope(x))"""
    return rms_norm(rotation(x, cos, sin), w, eps=eps)


@qk_norm_rope.near_miss("only half of the columns are in the mean square")
def norm_of_one_half(x: Full, cos: Positions, sin: Positions, *, eps: float = constant(1e-6)) -> Tensor:
    x1, _ = x.chunk(2, -1)
    return rotated(x * torch.rsqrt(x1.pow(2).mean(-1, keepdim=True) + eps), cos, sin)
