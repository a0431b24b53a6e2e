"""DoRA: adapters that read the weight they adapt are captured with their block, over plain and over 4-bit weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import fxfuse
from tests.model import builders as build
from tests.model.builders import step, tokens
from tests.model.quantized_models import in_4bit, in_8bit

peft = pytest.importorskip("peft")


def dora(base: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=True, init_lora_weights=False)
    return peft.get_peft_model(base, config).train()


def compared(make: Callable[[], nn.Module]) -> fxfuse.Report:
    """A step of the optimized model has eager's loss and gradients, up to float32 rounding."""
    model, eager = fxfuse.optimize(dora(make()), validate="off", remainder="eager", strict=True), dora(make())
    ours, theirs = (step(each, {**tokens(), "use_cache": False}) for each in (model, eager))
    assert ours.keys() == theirs.keys()
    assert any("lora_magnitude_vector" in name for name in ours)
    for name, want in theirs.items():
        assert (ours[name] - want).norm() <= 2e-5 * want.norm(), name
    return fxfuse.report(model)


@pytest.mark.parametrize("make", [lambda: build.llama(1), lambda: in_4bit(build.llama(1))], ids=["plain", "4-bit"])
def test_blocks_are_captured_whole(make: Callable[[], nn.Module]) -> None:
    from peft.tuners.lora import dora as used
    from peft.utils import integrations

    before = integrations.dequantize_module_weight
    report = compared(make)
    assert {graph.kind for graph in report.graphs} == {"block", "head", "leaf"}
    assert not [note for note in report.notes if "eager" in note]
    assert report.count("rope") == 2
    assert report.count("nf4_linear") in (0, 7)
    assert integrations.dequantize_module_weight is used.dequantize_module_weight is before  # (nothing of PEFT is replaced)


def test_weights_of_other_storage_are_named() -> None:
    report = compared(lambda: in_8bit(build.llama(1)))
    said = [note for note in report.notes if "LlamaDecoderLayer" in note]
    assert any("an adapter reads a weight of a storage that is not traced" in note for note in said), said
    report.assert_fused("rms_norm")
