"""Normalisation of rows: RMSNorm, LayerNorm, L2 norm, and what is fused onto them: a residual before, a gate after.

A norm saves its input (which lives anyway) and one or two numbers a row; with a residual, the new residual instead.
``w`` may be any function of column operands, so a model's ``1 + w`` is no other rule.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fxfuse.rules import Column, Full, Shared, constant, one_of, pattern

Norm = Callable[[Tensor, Tensor, Tensor, float], Tensor]
Activation = Callable[[Tensor], Tensor]


@pattern(absent={"w": 1})
def rms_norm(x: Full, w: Column, *, eps: float = constant(1e-6)) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * w"""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w


@rms_norm.near_miss("eps is added after the square root")
def eps_after_the_root(x: Full, w: Column, *, eps: float = constant(1e-6)) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + eps) * w


@rms_norm.near_miss("the root is not inverted: x is multiplied by it")
def multiplied_by_the_root(x: Full, w: Column, *, eps: float = constant(1e-6)) -> Tensor:
    return x * torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w


@rms_norm.near_miss("the mean of |x| is taken, not of its square")
def mean_of_absolutes(x: Full, w: Column, *, eps: float = constant(1e-6)) -> Tensor:
    return x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + eps) * w


@rms_norm.near_miss("the weight is different in every row")
def weight_of_every_row(x: Full, w: Full, *, eps: float = constant(1e-6)) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w


@pattern(absent={"w": 1, "b": 0})
def layer_norm(x: Full, w: Column, b: Column, *, eps: float = constant(1e-5)) -> Tensor:
    """(x - mean(x)) / sqrt(var(x) + eps) * w + b"""
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps) * w + b


@layer_norm.near_miss("x is not centred before it is scaled")
def scaled_but_not_centred(x: Full, w: Column, b: Column, *, eps: float = constant(1e-5)) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps) * w + b


@layer_norm.near_miss("the variance is not of the centred x")
def centred_but_scaled_by_the_mean_square(x: Full, w: Column, b: Column, *, eps: float = constant(1e-5)) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w + b


@layer_norm.near_miss("eps is added to the standard deviation, not to the variance")
def eps_after_the_deviation(x: Full, w: Column, b: Column, *, eps: float = constant(1e-5)) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True).sqrt() + eps) * w + b


@pattern(absent={"w": 1})
def l2_norm(x: Full, w: Column, *, eps: float = constant(1e-6)) -> Tensor:
    """x / sqrt(sum(x^2) + eps) * w"""
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + eps) * w


@l2_norm.also
def l2_norm_clamped(x: Full, w: Column, *, eps: float = constant(1e-12)) -> Tensor:
    """x / max(|x|, eps) * w"""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(eps) * w


@l2_norm.also
def l2_norm_plain(x: Full, w: Column) -> Tensor:
    """x / |x| * w"""
    return x / x.pow(2).sum(-1, keepdim=True).sqrt() * w


@l2_norm.near_miss("the sum of |x| divides it, not the root of the sum of squares")
def l1_norm(x: Full, w: Column) -> Tensor:
    return x / x.abs().sum(-1, keepdim=True) * w


@rms_norm.near_miss("the sum is taken, not the mean, and a constant stands for the number of columns")
def mean_of_another_width(x: Full, w: Column, *, width: float = constant(5.0), eps: float = constant(1e-6)) -> Tensor:
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / width + eps) * w


def rms(x: Tensor, w: Tensor, b: Tensor, eps: float) -> Tensor:
    return rms_norm(x, w, eps=eps)


def layer(x: Tensor, w: Tensor, b: Tensor, eps: float) -> Tensor:
    return layer_norm(x, w, b, eps=eps)


@pattern(absent={"w": 1, "b": 0, "z": 0})
def residual_norm(
    x: Full, r: Full, w: Column, b: Column, *, norm: Norm = one_of(rms, layer), eps: float = constant(1e-6)
) -> tuple[Tensor, Tensor]:
    """norm(h) of h = x + r, which is kept where the layer goes on from it"""
    h = x + r
    return h, norm(h, w, b, eps)


@residual_norm.also
def scaled_residual_norm(
    x: Full, r: Full, w: Column, b: Column, *,
    norm: Norm = one_of(rms, layer), scale: float = constant(0.22), eps: float = constant(1e-6),
) -> tuple[Tensor, Tensor]:
    """h = scale * x + r"""
    h = scale * x + r
    return h, norm(h, w, b, eps)


@residual_norm.also
def gained_residual_norm(
    x: Full, r: Full, gain: Column, w: Column, b: Column, *,
    norm: Norm = one_of(rms, layer), eps: float = constant(1e-6),
) -> tuple[Tensor, Tensor]:
    """h = gain * x + r, a gain for each column (or one for all)"""
    h = gain * x + r
    return h, norm(h, w, b, eps)


@residual_norm.also
def two_branches_and_norm(
    x: Full, z: Full, r: Full, w: Column, b: Column, *, norm: Norm = one_of(rms, layer), eps: float = constant(1e-6)
) -> tuple[Tensor, Tensor]:
    """h = x + z + r: attention and MLP side by side"""
    h = x + z + r
    return h, norm(h, w, b, eps)


@residual_norm.also
def embedding_norm(
    x: Full, z: Full, r: Shared, w: Column, b: Column, *, norm: Norm = one_of(rms, layer), eps: float = constant(1e-6)
) -> Tensor:
    """norm(x + z + r): embeddings of tokens and positions (z may be missing)"""
    return norm(x + z + r, w, b, eps)


@residual_norm.also
def norm_and_residual(
    x: Full, r: Full, w: Column, b: Column, *, norm: Norm = one_of(rms, layer), eps: float = constant(1e-6)
) -> Tensor:
    """norm(x) + r"""
    return norm(x, w, b, eps) + r


@residual_norm.also
def sandwich(
    x: Full, r: Full, w: Column, b: Column, u: Column, c: Column, *,
    norm: Norm = one_of(rms, layer), eps: float = constant(1e-6),
) -> tuple[Tensor, Tensor]:
    """h = norm(x) + r and norm(h)"""
    h = norm(x, w, b, eps) + r
    return h, norm(h, u, c, eps)


@residual_norm.near_miss("the two are subtracted")
def difference_norm(x: Full, r: Full, w: Column, *, eps: float = constant(1e-6)) -> tuple[Tensor, Tensor]:
    h = r - x
    return h, rms_norm(h, w, eps=eps)


@residual_norm.near_miss("the normalised sum is added to the sum")
def normalised_sum_twice(x: Full, r: Full, w: Column, *, eps: float = constant(1e-6)) -> tuple[Tensor, Tensor]:
    h = x + r
    y = rms_norm(h, w, eps=eps)
    return y, y + h


@pattern(absent={"w": 1})
def gated_norm(
    x: Full, gate: Full, w: Column, *, act: Activation = one_of(F.silu, torch.sigmoid), eps: float = constant(1e-6)
) -> Tensor:
    """rms_norm(x) * act(gate)"""
    return rms_norm(x, w, eps=eps) * act(gate)


@gated_norm.also
def gate_before_the_norm(
    x: Full, gate: Full, w: Column, *, act: Activation = one_of(F.silu, torch.sigmoid), eps: float = constant(1e-6)
) -> Tensor:
    """rms_norm(x * act(gate))"""
    return rms_norm(x * act(gate), w, eps=eps)


@gated_norm.near_miss("the mean square is of the ungated x")
def gate_between(x: Full, gate: Full, w: Column, *, eps: float = constant(1e-6)) -> Tensor:
    gated = x * F.silu(gate)
    return gated * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w * gate
