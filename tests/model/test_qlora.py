"""Models with 4-bit weights and adapters on every linear train as in eager: losses and every adapter's gradient, on shared graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse.validation import error_ratio
from tests.model.builders import causal_lm, gemma2, llama, step, tokens
from tests.model.quantized_models import in_4bit, in_8bit, with_adapters

pytest.importorskip("bitsandbytes")

# Packed projections; biases; post-norms and softcaps; parallel attention and MLP with biases and partial rotations.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "phi3": lambda: causal_lm("phi3", 2),
    "qwen2": lambda: causal_lm("qwen2", 2),
    "gemma2": lambda: gemma2(2),
    "gpt_neox": lambda: causal_lm("gpt_neox", 2),
}
LINEARS = {"llama": 7, "phi3": 4, "qwen2": 7, "gemma2": 7, "gpt_neox": 4}  # of a layer


def in_float64(model: nn.Module) -> nn.Module:
    """The same model with its weights as bitsandbytes dequantizes them, everything in float64."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    exact = copy.deepcopy(model)
    for module in list(exact.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Linear4bit):
                plain = nn.Linear(child.in_features, child.out_features, child.bias is not None)
                plain.weight = nn.Parameter(dequantize_4bit(child.weight.data, child.weight.quant_state), requires_grad=False)
                plain.bias = child.bias
                setattr(module, name, plain)
    return exact.double()


def worse(ours: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor], limit: float) -> list[str]:
    """Names whose error is more than ``limit`` times eager's, or that are missing."""
    assert set(ours) == set(eager) == set(exact)
    ratios = {name: error_ratio(ours[name], eager[name], exact[name]) for name in eager}
    return [f"{name}: {ratio:.2f}" for name, ratio in ratios.items() if not ratio <= limit]


def test_losses_gradients_and_graphs_of_four_layers() -> None:
    """The first layer's input needs no gradient, so it has a graph of its own; the others share one. Without gradients eager runs."""
    model = with_adapters(in_4bit(llama(4, tie_word_embeddings=True)))
    batch = tokens()
    eager, exact = step(model, batch), step(in_float64(model), batch)
    with torch.no_grad():
        logits = model(**batch).logits
    fxfuse.optimize(model, remainder="eager", strict=True)
    ours = step(model, batch)
    assert worse(ours, eager, exact, 2.0) == []
    report = fxfuse.report(model)
    assert report.count("nf4_linear") == 4 * LINEARS["llama"]
    blocks = [graph.calls for graph in report.graphs if graph.kind == "block"]
    assert sorted(blocks) == [1, 3]
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, logits)
    assert fxfuse.report(model).count("nf4_linear") == 4 * LINEARS["llama"]
    assert sorted(graph.calls for graph in fxfuse.report(model).graphs if graph.kind == "block") == [1, 3]


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in ("gemma2", "gpt_neox") else kind
                                  for kind in MODELS])  # fmt: skip
def test_losses_and_gradients(kind: str) -> None:
    model = with_adapters(in_4bit(MODELS[kind]()))
    model.enable_input_require_grads()
    batch = tokens()
    eager, exact = step(model, batch), step(in_float64(model), batch)
    assert sum("lora_" in name for name in eager) == 2 * 2 * LINEARS[kind]
    fxfuse.optimize(model, remainder="eager", strict=True)
    assert worse(step(model, batch), eager, exact, 2.0) == []
    report = fxfuse.report(model)
    assert report.count("nf4_linear") == 2 * LINEARS[kind]
    assert report.errors == []


def test_explained_without_data() -> None:
    """The image of a quantized weight has its scales with it; explaining changes nothing."""
    model = with_adapters(in_4bit(llama(1)))
    before = step(model, tokens())
    report = fxfuse.explain(model, **tokens())
    assert report.count("nf4_linear") == LINEARS["llama"]
    assert report.errors == []
    assert worse(step(model, tokens()), before, before, 0.0) == []


def test_weights_of_eight_bits_are_left_and_named() -> None:
    model = with_adapters(in_8bit(llama(1)))
    batch = tokens()
    eager = step(model, batch)
    fxfuse.optimize(model, remainder="eager")
    for name, value in step(model, batch).items():
        torch.testing.assert_close(value, eager[name], rtol=1e-4, atol=1e-6)
    sites = [site for site in fxfuse.report(model).sites if site.rule == "nf4_linear"]
    assert {site.status for site in sites} == {"declined"}
    assert all("LLM.int8" in site.reason for site in sites)


def test_in_bfloat16_with_float32_adapters() -> None:
    """As QLoRA is trained: everything frozen in bfloat16, the adapters in float32."""
    model = with_adapters(in_4bit(llama(1).bfloat16(), torch.bfloat16))
    model.enable_input_require_grads()
    batch = tokens(4, 24)
    eager, exact = step(model, batch), step(in_float64(model), batch)
    fxfuse.optimize(model, remainder="eager", strict=True)
    ours = step(model, batch)
    assert worse(ours, eager, exact, 2.0) == []
    assert worse(step(model, batch), ours, ours, 0.0) == []
    assert fxfuse.report(model).count("nf4_linear") == LINEARS["llama"]
