"""What linears with adapters keep for the backward, and which kernels they do without; at small sizes, by formula."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from fxfuse.fake_model import fake_mode
from fxfuse.reporting.records import GraphRecord
from tests.adapted_modules import Attentionlike, GatedMLP, Kinds, compiled
from tests.residual.test_memory import fused, kept_mib
from tests.saved_storages import saved_storages

TOKENS, WIDTH, HIDDEN, RANK = 64, 64, 112, 8


def kept(module: nn.Module, autocast: bool = False) -> tuple[int, Tensor]:
    """Bytes of the distinct storages that are kept, beyond parameters and the input; and the output."""
    x = torch.randn(2, TOKENS // 2, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), saved_storages([x, *module.parameters()]) as saved:
        y = compiled(module)(x)
    return saved.bytes(), y


@pytest.mark.parametrize(("adapters", "autocast"), [(torch.bfloat16, False), (torch.float32, True), (torch.float32, False)])
def test_a_gated_mlp_keeps_gate_and_up_and_what_is_thin(adapters: torch.dtype, autocast: bool, records: list[GraphRecord]) -> None:
    wide = adapters == torch.float32
    module = Kinds(adapters=adapters, autocast=autocast).prepare(GatedMLP(WIDTH, HIDDEN, rank=RANK, casts=wide))
    saved, y = kept(module, autocast)
    gate_and_up = 2 * TOKENS * HIDDEN * 2
    thin = 3 * TOKENS * RANK * (4 if wide and not autocast else 2) + TOKENS * 4  # the three x A', a statistic for each row
    casts = 3 * (2 * WIDTH + HIDDEN) * RANK * 2 if autocast else 0  # adapters as autocast rounds them
    assert gate_and_up <= saved <= gate_and_up + thin + casts
    y.sum().backward()
    large = re.compile(r"aten\.(add|mul)\.\w+\((?!mixed_product)")  # (factors of thin products may stand alone)
    assert not large.findall(records[-1].forward_source)  # the residual is read where the last thin term is written
    assert not large.findall(records[-1].backward_source)  # its gradient is added by the norm's backward
    assert "torch.float32" not in re.sub(r"rooms = \[.*?\]", "", records[-1].forward_source)  # no wide copy of x


def test_at_the_sizes_of_an_8b_model() -> None:
    """448 MiB are gate and up, of 8192 tokens; eager keeps more than twice as much."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with fake_mode():
            module, x = GatedMLP(4096, 14336, rank=16), torch.empty(2, 4096, 4096, requires_grad=True)
            for name, parameter in module.named_parameters():
                parameter.requires_grad_("lora_" in name)
            assert kept_mib(module, x) > 1000
            assert 448 <= kept_mib(fused(module), x) <= 450
    finally:
        torch.set_default_dtype(torch.float32)


def test_nothing_wide_is_scaled_or_added(records: list[GraphRecord]) -> None:
    module = Kinds().prepare(Attentionlike(scales=(0.7,)))
    _, y = kept(module)
    y.sum().backward()
    for source in (records[-1].forward_source, records[-1].backward_source):
        assert "aten.mul.Tensor" not in source
        assert "aten.mul.Scalar" not in source
        assert "aten.add." not in source  # the residual goes with a thin term, its gradient into the norm's backward
