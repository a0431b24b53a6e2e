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

MODELS: dict[str, Callable[[], nn.Module]] = {
    "phi3": lambda: causal_lm("phi3", 2),  # packed projections
    "qwen2": lambda: causal_lm("qwen2", 2),  # biases
    "gemma2": lambda: gemma2(2),  # norms behind blocks too, softcaps
    "gpt_neox": lambda: causal_lm("gpt_neox", 2),  # parallel attention and MLP, biases, partial rotations, packed projections
    "qwen3": lambda: causal_lm("qwen3", 2, head_dim=16),  # norms of queries and keys
    "olmo2": lambda: causal_lm("olmo2", 2),  # norms behind blocks alone
    "phi": lambda: causal_lm("phi", 2, num_key_value_heads=4, resid_pdrop=0.0, embd_pdrop=0.0),  # parallel, biases, no gate
    "cohere": lambda: causal_lm("cohere", 2, use_qk_norm=True),  # parallel, LayerNorms, a tied head, scaled logits
    "granite": lambda: causal_lm("granite", 2, residual_multiplier=0.5, logits_scaling=4.0, tie_word_embeddings=True),  # scaled sums
    "starcoder2": lambda: causal_lm("starcoder2", 2, residual_dropout=0.0, embedding_dropout=0.0),  # LayerNorms, biases, tied
    "stablelm": lambda: causal_lm("stablelm", 2, partial_rotary_factor=0.5),
    "gemma3_text": lambda: causal_lm("gemma3_text", 2, head_dim=16, sliding_window=8, query_pre_attn_scalar=16),  # tied, four norms
    "glm4": lambda: causal_lm("glm4", 2, head_dim=16),  # packed gate and up, four norms, interleaved rotations
}
LLAMA = 7  # linears of one of its layers
QUICK = ("phi3", "qwen2")


def linears(model: nn.Module) -> int:
    """How many 4-bit linears a model has."""
    from bitsandbytes.nn import Linear4bit

    return sum(isinstance(module, Linear4bit) for module in model.modules())


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
    """The first layer's input needs no gradient, and still they all share one graph. Without gradients eager runs."""
    model = with_adapters(in_4bit(llama(4, tie_word_embeddings=True)))
    batch = tokens()
    eager, exact = step(model, batch), step(in_float64(model), batch)
    with torch.no_grad():
        logits = model(**batch).logits
    fxfuse.optimize(model, remainder="eager", strict=True)
    ours = step(model, batch)
    assert worse(ours, eager, exact, 2.0) == []
    report = fxfuse.report(model)
    assert report.count("nf4_linear") == 4 * LLAMA
    blocks = [graph.calls for graph in report.graphs if graph.kind == "block"]
    assert blocks == [4]
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, logits)
    assert fxfuse.report(model).count("nf4_linear") == 4 * LLAMA
    assert [graph.calls for graph in fxfuse.report(model).graphs if graph.kind == "block"] == [4]


@pytest.mark.parametrize("kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in MODELS])
def test_losses_and_gradients(kind: str) -> None:
    model = with_adapters(in_4bit(MODELS[kind]()))
    model.enable_input_require_grads()
    batch = tokens()
    eager, exact = step(model, batch), step(in_float64(model), batch)
    assert sum("lora_" in name for name in eager) == 2 * linears(model) >= 2 * 2 * 4
    fxfuse.optimize(model, remainder="eager", strict=True)
    assert worse(step(model, batch), eager, exact, 2.0) == []
    report = fxfuse.report(model)
    assert report.count("nf4_linear") == linears(model)
    assert report.errors == []


def test_explained_without_data() -> None:
    """The image of a quantized weight has its scales with it; explaining changes nothing."""
    model = with_adapters(in_4bit(llama(1)))
    before = step(model, tokens())
    report = fxfuse.explain(model, **tokens())
    assert report.count("nf4_linear") == LLAMA
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
    assert fxfuse.report(model).count("nf4_linear") == LLAMA
