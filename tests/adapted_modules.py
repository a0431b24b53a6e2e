"""Modules with low-rank adapters, written out, and a step of them in float64, in eager mode and compiled."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.backend import Backend
from fxfuse.reporting.records import GraphRecord
from fxfuse.validation import error_ratio


class Adapted(nn.Module):
    """``linear(x) + sum_i s_i * B_i A_i drop(x)``; x goes to the adapter's dtype and the sum comes back, as adapter libraries do."""

    def __init__(self, width: int, outputs: int, rank: int = 8, scales: tuple[float, ...] = (2.0,), bias: bool = False,
                 dropout: float = 0.0, casts: bool = False) -> None:
        super().__init__()
        self.base = nn.Linear(width, outputs, bias=bias)
        self.scales, self.casts = scales, casts
        self.lora_A = nn.ModuleList(nn.Linear(width, rank, bias=False) for _ in scales)
        self.lora_B = nn.ModuleList(nn.Linear(rank, outputs, bias=False) for _ in scales)
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)
        dtype = result.dtype
        for a, b, scale in zip(self.lora_A, self.lora_B, self.scales, strict=True):
            x = x.to(a.weight.dtype) if self.casts else x
            result = result + b(a(self.drop(x))) * scale
        return result.to(dtype)


class Attentionlike(nn.Module):
    """Three linears of one input, whose results meet; a fourth of what they make."""

    def __init__(self, width: int = 64, narrow: int = 32, **options: Any) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.q, self.k, self.v = (Adapted(width, n, **options) for n in (narrow, narrow, narrow))
        self.o = Adapted(narrow, width, **options)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.o(torch.tanh(self.q(y)) * torch.sigmoid(self.k(y)) + self.v(y))


class GatedMLP(nn.Module):
    def __init__(self, width: int = 64, hidden: int = 112, **options: Any) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate, self.up = (Adapted(width, hidden, **options) for _ in range(2))
        self.down = Adapted(hidden, width, **options)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


@dataclass
class Kinds:
    """Dtypes of a trial: of the model, of its adapters; whether autocast is on and the base is trained."""

    model: torch.dtype = torch.bfloat16
    adapters: torch.dtype = torch.bfloat16
    autocast: bool = False
    trained_base: bool = False

    def prepare(self, module: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        for name, parameter in module.named_parameters():
            adapter = "lora_" in name
            nn.init.normal_(parameter, std=0.3 if adapter else parameter.shape[-1] ** -0.5)
            parameter.data = parameter.data.to(self.adapters if adapter else self.model)
            parameter.requires_grad_(adapter or self.trained_base)
        return module


def step(run: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, autocast: bool) -> dict[str, Tensor]:
    """The output and every gradient of a step."""
    torch.manual_seed(5)
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        y = run(x)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(torch.bfloat16).to(y.dtype)
    y.backward(cotangent)
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "x": x.grad, **grads}


def compiled(module: nn.Module, **options: Any) -> Callable[[Tensor], Tensor]:
    return torch.compile(module, backend=Backend(remainder="eager", strict=True, **options), fullgraph=True, dynamic=True)


def ratios(module: nn.Module, kinds: Kinds, rows: tuple[int, ...] = (3, 40), width: int = 64, scale: float = 1.0,
           fault: Callable[[nn.Module], None] | None = None, **options: Any) -> dict[str, float]:
    """By name of the output or gradient: how much further from float64 the compiled module is than eager.

    ``fault`` spoils the module that is compiled: the judge must see it.
    """
    module = kinds.prepare(module)
    x = (torch.randn(*rows, width, generator=torch.Generator().manual_seed(3)) * scale).to(torch.bfloat16)
    exact = copy.deepcopy(module).double()
    truth = step(exact, exact, x.double(), False)
    plain = copy.deepcopy(module)
    eager = step(plain, plain, x.to(kinds.model), kinds.autocast)
    if fault is not None:
        fault(module)
    ours = step(compiled(module, **options), module, x.to(kinds.model), kinds.autocast)
    assert set(ours) == set(eager) == set(truth)
    for name in ours:
        assert ours[name].dtype == eager[name].dtype, name
    return {name: error_ratio(ours[name], eager[name], truth[name]) for name in eager}


def sites(record: GraphRecord, rule: str, status: str = "fused") -> list[str]:
    return [site.module for site in record.sites if site.rule == rule and site.status == status]
