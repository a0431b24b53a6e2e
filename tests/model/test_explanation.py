"""``explain`` says what ``optimize`` will do, without weights, and leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, T5Config, ViTConfig

import fxfuse
from fxfuse.fake_model import fake_mode, image_of, model_from_config
from fxfuse.reporting.records import Report

SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)


@pytest.fixture
def config() -> LlamaConfig:
    return LlamaConfig(**SMALL, num_key_value_heads=2, dtype=torch.float32)


def places(report: Report) -> set[tuple]:
    return {(site.rule, site.module, site.status, site.count) for site in report.sites}


def test_it_says_what_optimize_then_does(config: LlamaConfig) -> None:
    told = fxfuse.explain(config)
    model = fxfuse.optimize(AutoModelForCausalLM.from_config(config))
    ids = torch.randint(64, (2, 16))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert places(told) == places(fxfuse.report(model))
    assert all(site.launches == 0 for site in told.sites)


def test_a_model_is_explained_like_its_config_and_not_touched(config: LlamaConfig) -> None:
    model = AutoModelForCausalLM.from_config(config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    marks = [dict(vars(module)) for module in model.modules()]
    assert places(fxfuse.explain(model)) == places(fxfuse.explain(config))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [set(vars(module)) for module in model.modules()] == [set(mark) for mark in marks]
    assert all(module._compiled_call_impl is None for module in model.modules())
    assert fxfuse.report(model).sites == []


def test_tied_weights_are_one_weight(config: LlamaConfig) -> None:
    config.tie_word_embeddings = True
    with fake_mode():
        model = model_from_config(config)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_a_large_model_needs_no_memory() -> None:
    with fake_mode():
        model = model_from_config(AutoConfig.for_model("llama"))
        assert sum(parameter.numel() for parameter in model.parameters()) > 6e9
    told = fxfuse.explain(AutoConfig.for_model("llama", num_hidden_layers=4))
    told.assert_fused("rms_norm")


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64),
        T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64),
        ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32),
    ],
    ids=lambda config: config.model_type,
)
def test_other_designs_are_explained_too(config) -> None:
    told = fxfuse.explain(config)
    assert not told.errors
    assert any(site.status == "fused" for site in told.sites)


def test_a_plain_module_is_explained_for_the_inputs_given() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.RMSNorm(16, eps=1e-6)
            self.up = nn.Linear(16, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.silu(self.up(self.norm(x)))

    fxfuse.explain(Block(), x=torch.empty(8, 16)).assert_fused("rms_norm")
    with pytest.raises(TypeError, match="does not know what Block takes; give its inputs by name"):
        fxfuse.explain(Block())


def test_an_image_keeps_ties_dtypes_and_frozen_parameters(config: LlamaConfig) -> None:
    config.tie_word_embeddings = True
    model = AutoModelForCausalLM.from_config(config)
    model.model.norm.weight.requires_grad_(False)
    with fake_mode():
        image = image_of(model)
    assert image.lm_head.weight is image.model.embed_tokens.weight
    for (name, real), (same, fake) in zip(model.named_parameters(), image.named_parameters(), strict=True):
        assert name == same
        assert (real.shape, real.dtype, real.requires_grad) == (fake.shape, fake.dtype, fake.requires_grad)


def test_a_config_is_found_where_it_lies(config: LlamaConfig, tmp_path) -> None:
    config.save_pretrained(tmp_path)
    for place in (tmp_path, str(tmp_path / "config.json")):
        assert places(fxfuse.explain(place)) == places(fxfuse.explain(config))
    with pytest.raises(ValueError, match=r"has no config\.json"):
        fxfuse.explain(tmp_path.parent)


@pytest.mark.parametrize("wrong", [["llama"], 3, None])
def test_what_is_neither_model_nor_config_is_named(wrong) -> None:
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module or a transformers config"):
        fxfuse.explain(wrong)
