"""Blocks in tiles, for tests: every graph that is compiled is cut, and outputs and gradients are collected by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, fx, nn

from fxfuse import aot
from fxfuse.backend import Backend
from fxfuse.bufferize import bufferize
from tests.adapted_modules import GatedMLP, Kinds

Report = TypeVar("Report")


def cut_every_graph(monkeypatch: pytest.MonkeyPatch, cut: Callable[[fx.GraphModule], Report]) -> list[Report]:
    """Every graph that is compiled from here on is cut in that way; what the cutting of each gives, as they come."""
    reports: list[Report] = []

    def in_tiles(gm: fx.GraphModule, *args: Any) -> int:
        reports.append(cut(gm))
        return bufferize(gm, *args)

    monkeypatch.setattr(aot, "bufferize", in_tiles)
    return reports


def adapted_mlp(width: int, hidden: int, rank: int, dtype: torch.dtype, trained: bool) -> nn.Module:
    """A gated MLP with adapters, of which either all is trained or the adapters are."""
    module = Kinds(model=dtype, adapters=dtype).prepare(GatedMLP(width, hidden, rank=rank))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(trained or "lora_" in name)
    return module


def compiled(module: nn.Module, plan: str = "none") -> Any:
    """The module as a memory plan has it."""
    backend = Backend(validate="off", strict=True, remainder="eager", plan=plan)
    return torch.compile(module, backend=backend, fullgraph=True, dynamic=True)


def gradients(module: nn.Module, run: Any, x: Tensor, g: Tensor, times: int = 1) -> dict[str, Tensor]:
    """Of the input and every parameter, by the last of some backwards through one graph; and the output."""
    x = x.detach().requires_grad_()
    y = run(x)
    for again in reversed(range(times)):
        x.grad = None
        module.zero_grad()
        y.backward(g, retain_graph=again > 0)
    named = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "input": x.grad} | named  # type: ignore[dict-item]
