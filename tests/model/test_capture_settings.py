"""The settings of a captured compilation hold while it compiles, and no longer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.backend import Backend
from fxfuse.capture.context import SETTINGS


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(8, eps=1e-6), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(self.norm(x))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_the_users_settings_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [getattr(owner, name) for owner, name, _ in SETTINGS]
    seen: list[Any] = []
    rewrite = Backend.rewrite
    monkeypatch.setattr(Backend, "rewrite", lambda *a: seen.append(now()) or rewrite(*a))

    def now() -> list[Any]:
        return [getattr(owner, name) for owner, name, _ in SETTINGS]

    fxfuse.optimize(Stack())(torch.randn(2, 5, 8)).sum().backward()
    assert seen
    chosen = [name for _, name, _ in SETTINGS].index("use_duck_shape")  # by the sizes of the call
    for values in seen:
        assert values[:chosen] + values[chosen + 1 :] == [value for _, name, value in SETTINGS if name != "use_duck_shape"]
    assert now() == before
