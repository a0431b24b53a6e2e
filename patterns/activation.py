"""Activations, one operand in and one out.

Saves its operand (or its result, where the derivative is a function of that alone); everything else is recomputed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fxfuse.rules import Full, constant, one_of, pattern

Activation = Callable[[Tensor], Tensor]


def gelu_erf(x: Tensor) -> Tensor:
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def gelu_tanh_factored(x: Tensor) -> Tensor:
    """The same, with x taken out of the bracket."""
    return 0.5 * x * (1.0 + torch.tanh(x * math.sqrt(2 / math.pi) * (1.0 + 0.044715 * x * x)))


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


def mish(x: Tensor) -> Tensor:
    return x * torch.tanh(F.softplus(x))


# silu is spelled x * sigmoid(x), its canonical form.
ACTIVATIONS = (F.silu, gelu_erf, gelu_tanh, gelu_tanh_factored, quick_gelu, F.relu, relu_squared, mish)


@pattern
def activation(x: Full, *, act: Activation = one_of(*ACTIVATIONS, F.softplus, F.sigmoid)) -> Tensor:
    """act(x)"""
    return act(x)


@activation.also
def softcap(x: Full, *, cap: float = constant(30.0)) -> Tensor:
    """cap * tanh(x / cap)"""
    return cap * torch.tanh(x / cap)


@activation.also
def scaled_activation(x: Full, *, act: Activation = one_of(F.silu, gelu_tanh), scale: float = constant(0.7)) -> Tensor:
    """act(scale * x)"""
    return act(scale * x)


@activation.near_miss("a softcap divides by one number and multiplies by another")
def softcap_of_two_numbers(x: Full, *, cap: float = constant(30.0), other: float = constant(20.0)) -> Tensor:
    return cap * torch.tanh(x / other)


@activation.near_miss("a gelu has another constant than 0.044715")
def gelu_of_another_cubic(x: Full, *, cubic: float = constant(0.05)) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (x + cubic * x.pow(3))))


@activation.near_miss("a gelu has another slope than 1 / sqrt(2)")
def gelu_of_another_slope(x: Full, *, slope: float = constant(0.6)) -> Tensor:
    return 0.5 * x * (1.0 + torch.erf(slope * x))


@activation.near_miss("the sigmoid of a gelu is taken of another multiple of x than 1.702")
def sigmoid_gelu_of_another_slope(x: Full, *, slope: float = constant(1.5)) -> Tensor:
    return x * torch.sigmoid(slope * x)
