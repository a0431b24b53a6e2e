"""Gated activation: act(gate) * up, consumed by the down projection.

Saves gate and up; recomputes the product in the backward: a third of the MLP's activations. Gate and up may be two tensors, or lanes
of one (packed halves, interleaved). relu squared without a gate is in activation.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fxfuse.patterns.activation import ACTIVATIONS, Activation, gelu_erf, gelu_tanh
from fxfuse.rules import Full, Row, constant, one_of, pattern


@pattern
def gated_activation(
    gate: Full, up: Full, *, act: Activation = one_of(*ACTIVATIONS, torch.sigmoid, torch.tanh)
) -> Tensor:
    """act(gate) * up"""
    return act(gate) * up


@gated_activation.also
def scaled_gated_activation(
    gate: Full, up: Full, *, act: Activation = one_of(F.silu, gelu_erf, gelu_tanh),
    inner: float = constant(0.7), outer: float = constant(1.3),
) -> Tensor:
    """act(inner * gate) * up * outer"""
    return act(inner * gate) * up * outer


@gated_activation.also
def rescaled_gated_activation(
    gate: Full, up: Full, *, act: Activation = one_of(F.silu, gelu_erf, gelu_tanh), outer: float = constant(1.3)
) -> Tensor:
    """act(gate) * up * outer"""
    return act(gate) * up * outer


@gated_activation.also
def scaled_gate(
    gate: Full, up: Full, *, act: Activation = one_of(F.silu, gelu_erf, gelu_tanh), inner: float = constant(0.7)
) -> Tensor:
    """act(inner * gate) * up"""
    return act(inner * gate) * up


@gated_activation.also
def clamped_swiglu(
    gate: Full, up: Full, *, alpha: float = constant(1.702), limit: float = constant(7.0)
) -> Tensor:
    """g sigmoid(alpha g) (u + 1) with g = min(gate, limit), u = clamp(up, -limit, limit)"""
    g = gate.clamp(max=limit)
    return (up.clamp(-limit, limit) + 1.0) * g * torch.sigmoid(alpha * g)


@gated_activation.also
def clamped_swiglu_with_bias(
    gate: Full, up: Full, gate_bias: Full, up_bias: Full, *,
    alpha: float = constant(1.702), limit: float = constant(7.0),
) -> Tensor:
    """The same of gate + gate_bias and up + up_bias: experts, whose biases are gathered for each row"""
    return clamped_swiglu(gate + gate_bias, up + up_bias, alpha=alpha, limit=limit)


@gated_activation.also
def row_gate(up: Full, gate: Row, *, act: Activation = one_of(torch.sigmoid, F.silu)) -> Tensor:
    """act(gate) * up, one gate for a row: a shared expert"""
    return act(gate) * up


@gated_activation.near_miss("the activation is added, not multiplied")
def added(gate: Full, up: Full) -> Tensor:
    return F.silu(gate) + up


@gated_activation.near_miss("the activation is of the product")
def activation_of_the_product(gate: Full, up: Full) -> Tensor:
    return F.silu(gate * up)


@gated_activation.near_miss("the sigmoid is not of the gate that it multiplies")
def sigmoid_of_the_other(gate: Full, up: Full, other: Full) -> Tensor:
    return gate * torch.sigmoid(other) * up


@gated_activation.near_miss("the clamps are at different limits")
def swiglu_of_two_limits(
    gate: Full, up: Full, *, alpha: float = constant(1.702), limit: float = constant(7.0), other: float = constant(5.0)
) -> Tensor:
    g = gate.clamp(max=limit)
    return (up.clamp(-other, other) + 1.0) * g * torch.sigmoid(alpha * g)
