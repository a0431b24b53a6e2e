"""Models as PEFT's ``prepare_model_for_kbit_training`` leaves them, under autocast: float32 norms, embeddings and adapters around 4-bit
weights. Activations are float32 between 16-bit products; adapters are fused all the same, and the float32 copies are not stored."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse.validation import error_ratio
from tests.model.builders import causal_lm, llama, step, tokens
from tests.model.quantized_models import in_4bit, with_adapters
from tests.model.test_qlora import in_float64

pytest.importorskip("bitsandbytes")
BF16 = torch.bfloat16


def prepared(model: nn.Module) -> nn.Module:
    from peft import prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(in_4bit(model.to(BF16), BF16), use_gradient_checkpointing=False)
    model = with_adapters(model)
    model.enable_input_require_grads()
    return model


def trained(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.autocast("cpu", BF16):
        return step(model, batch, use_cache=False)


@pytest.mark.parametrize("kind", ["llama", pytest.param("qwen2", marks=pytest.mark.slow)])
def test_losses_gradients_and_what_is_stored(kind: str) -> None:
    model = prepared(causal_lm(kind, 2))
    batch = tokens(4, 24)
    eager, exact = trained(model, batch), step(in_float64(model), batch)
    fxfuse.optimize(model, remainder="eager", strict=True)
    ours = trained(model, batch)
    assert set(ours) == set(eager) == set(exact)
    loss, expected, truth = (float(found.pop("loss")) for found in (ours, eager, exact))
    assert abs(loss - truth) <= 2 * abs(expected - truth) + 2**-9 * truth  # (one number: it may come out right by chance)
    ratios = {name: error_ratio(ours[name], eager[name], exact[name]) for name in eager}
    assert not {name: ratio for name, ratio in ratios.items() if not ratio <= 2.0}
    report = fxfuse.report(model)
    assert report.count("lora_linear") == report.count("nf4_linear") == 14
    assert {site.rule for site in report.sites} == {
        "nf4_linear", "lora_linear", "shared_input_linears", "rms_norm", "residual_norm", "rope", "gated_activation", "linear_loss"
    }  # fmt: skip
    assert all(site.status == "fused" for site in report.sites)
    assert report.errors == []
    block = next(graph for graph in report.graphs if graph.kind == "block")
    copies = re.findall(r"_to_copy\S* = torch.ops.aten._to_copy.default\((\w+), dtype = torch.bfloat16\)", block.forward_source)
    assert all(name.startswith(("primals_", "cat_")) for name in copies)  # of weights alone
    assert "dtype = torch.float32" not in block.forward_source


def test_a_scale_that_is_off_is_seen() -> None:
    """The measure of the test above tells adapters that are scaled wrongly by a twentieth."""
    model = prepared(llama(1))
    batch = tokens(4, 24)
    wrong = copy.deepcopy(model)
    for module in wrong.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling = {name: 1.05 * value for name, value in module.scaling.items()}
    eager, exact, found = trained(model, batch), step(in_float64(model), batch), trained(wrong, batch)
    assert max(error_ratio(found[name], eager[name], exact[name]) for name in eager if "lora_A" in name) > 4
