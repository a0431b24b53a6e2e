"""A linear and the loss over its output: the logits are never held.

    z = x W' + b            x [tokens, D], W [classes, D]: the logits, the largest tensor of a training step
    l_i = f(z_i, y_i)       any row program that ends in one number a row
    L   = sum_i w_i l_i     or nothing: then each row gets a cotangent of its own

Derived, with G_i = df/dz_i from the row program and the transposes of the product (fxfuse/linear_loss/products.py):

    dx = g G W      dW = g G' x      db = g sum_i G_i       g: the cotangent of L

Three ways to have them, by what is known in the forward. (a) One sum with weights that are known: dx and dW are computed there, while
a chunk of logits is at hand, for g = 1, and multiplied by g in the backward; nothing is divided by a count before, which float16 would
not survive. (b) A cotangent for each row, frozen W: dx the same, multiplied row by row. (c) Otherwise z is computed again in the
backward. What matches is found by structure, not by normal form: these functions are examples, tested like rules.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def flat(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return z.view(-1, z.shape[-1]), labels.reshape(-1)


def cross_entropy(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    """The mean over the rows that count."""
    return F.cross_entropy(*flat(F.linear(x, w).float(), labels))


def capped_and_shifted(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    """Logits bent by a softcap, each row judged by the label of the next position."""
    z = 30.0 * torch.tanh(F.linear(x, w) / 30.0)
    return F.cross_entropy(*flat(z[..., :-1, :].contiguous().float(), labels[..., 1:].contiguous()))


def capped_by_size(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    """Logits divided by a function of themselves: the cap reads them twice."""
    z = F.linear(x, w)
    return F.cross_entropy(*flat((z / (1.0 + z.abs() / 20.0))[:, :-1].contiguous(), labels[:, 1:]))


def with_z_loss(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    """A second number for each row: the square of the logarithm of the partition function."""
    z, labels = flat(F.linear(x, w).float(), labels)
    return F.cross_entropy(z, labels) + 1e-4 * torch.logsumexp(z, -1).square().mean()


def log_probabilities(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    """Of the given tokens; what becomes of them (DPO, GRPO) is left open, so every row gets a cotangent of its own."""
    return F.linear(x, w).float().log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def policy_gradient(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    """Their masked mean: one sum with weights that are known."""
    mask = labels >= 0
    return -(log_probabilities(x, w, labels) * mask).sum() / mask.sum()


def distillation(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    """The divergence from a teacher's logits (here made up from the labels) at temperature 2."""
    teacher = torch.sin(labels.unsqueeze(-1) * torch.arange(w.shape[0], device=w.device))
    target = F.log_softmax(teacher / 2, -1)
    return (target.exp() * (target - F.log_softmax(F.linear(x, w).float() / 2, -1))).sum(-1).mean()


MATCHING = {
    cross_entropy: "total",
    capped_and_shifted: "total",
    capped_by_size: "total",
    with_z_loss: "recompute",
    log_probabilities: "recompute",
    policy_gradient: "total",
    distillation: "total",
}


# What must not match, and what the report says of it.


def predictions_too(x: Tensor, w: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    z = F.linear(x, w)
    return F.cross_entropy(*flat(z, labels)), z.argmax(-1)


def confidence_too(x: Tensor, w: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    z = F.linear(x, w)
    return F.cross_entropy(*flat(z, labels)), z.mean()


def weighted_by_class(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w)
    return F.cross_entropy(*flat(z, labels), weight=torch.linspace(0.5, 1.5, z.shape[-1], device=z.device))


def adapted(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    """Two linears with a gradient."""
    z = F.linear(x, w) + F.linear(x * 2.0, w * 0.5)
    return F.cross_entropy(*flat(z, labels))


def trained_temperature(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    """Part of what the logits are divided by depends on the hidden states."""
    z = F.linear(x, w) / (1.0 + x.square().mean(-1, keepdim=True))
    return F.cross_entropy(*flat(z, labels))


def few_classes(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(*flat(F.linear(x, w[:2]), labels.clamp(max=1)))


NEAR_MISSES = {
    predictions_too: "are read by argmax",
    confidence_too: "are read by mean",
    weighted_by_class: "class weights",
    adapted: "the logits are a sum of several linears",
    trained_temperature: "which depends on more than",
    few_classes: "smaller than the hidden states",
}
