"""Cross-entropy on logits, a loss for each row; the mean over rows is left to torch.

Saves the logits (which live anyway), the labels and one logsumexp a row: never the probabilities.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fxfuse.rules import Labels, Logits, constant, one_of, pattern

Transform = Callable[[Tensor, float, float], Tensor]


def plain(x: Tensor, scale: float, cap: float) -> Tensor:
    return x


def scaled(x: Tensor, scale: float, cap: float) -> Tensor:
    return scale * x


def capped(x: Tensor, scale: float, cap: float) -> Tensor:
    return cap * torch.tanh(x / cap)


@pattern
def cross_entropy(
    x: Logits, label: Labels, *, logits: Transform = one_of(plain, scaled, capped),
    scale: float = constant(0.0625), cap: float = constant(30.0),
) -> Tensor:
    """logsumexp(z) - z[label], 0 where the label is to be ignored; z the logits, scaled or capped"""
    return F.cross_entropy(logits(x, scale, cap), label, reduction="none")


@cross_entropy.also
def smoothed_cross_entropy(
    x: Logits, label: Labels, *, logits: Transform = one_of(plain, scaled, capped),
    scale: float = constant(0.0625), cap: float = constant(30.0), smoothing: float = constant(0.1),
) -> Tensor:
    """(1 - smoothing) * cross_entropy + smoothing * (logsumexp(z) - mean(z))"""
    return F.cross_entropy(logits(x, scale, cap), label, reduction="none", label_smoothing=smoothing)


@cross_entropy.near_miss("every logit is subtracted, not that of the label")
def all_logits(x: Logits, label: Labels) -> Tensor:
    return torch.where(label[:, None] == -100, 0.0, torch.logsumexp(x, -1, keepdim=True) - x.sum(-1, keepdim=True))
