"""An imagined 4-bit or adapted model is what the libraries make: the same bytes, the same sites."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.longest import standing_bytes
from fxfuse.fake_adaptation import in_4bit, is_4bit, with_adapters
from fxfuse.fake_model import fake_mode, model_from_config
from tests.model import quantized_models

SMALL = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture
def config() -> LlamaConfig:
    return LlamaConfig(**SMALL, dtype=torch.bfloat16)


def real(config: LlamaConfig) -> nn.Module:
    pytest.importorskip("bitsandbytes")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return quantized_models.in_4bit(model, torch.bfloat16)


def shapes(model: nn.Module) -> dict[str, tuple]:
    return {name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in model.named_parameters()}


def test_4bit_weights_are_as_large_as_real_ones(config: LlamaConfig) -> None:
    model = real(config)
    with fake_mode():
        imagined = in_4bit(model_from_config(config))
    assert shapes(imagined) == shapes(model)
    assert standing_bytes(imagined) == standing_bytes(model)


def test_adapters_are_those_that_peft_makes(config: LlamaConfig) -> None:
    pytest.importorskip("peft")
    with fake_mode():
        imagined = with_adapters(in_4bit(model_from_config(config)), 4)
        plain = with_adapters(model_from_config(config), 4)
    adapted = quantized_models.with_adapters(real(config), rank=4)
    assert shapes(imagined).keys() == shapes(adapted).keys()
    assert {n: s[0] for n, s in shapes(imagined).items()} == {n: s[0] for n, s in shapes(adapted).items()}
    trained = {dtype for _, dtype, wanted in shapes(imagined).values() if wanted}
    assert trained == {torch.bfloat16}  # as trainers cast them on a quantized base
    assert {dtype for _, dtype, wanted in shapes(plain).values() if wanted} == {torch.float32}  # as PEFT leaves them


def test_a_config_says_that_its_weights_are_4bit(config: LlamaConfig) -> None:
    assert not is_4bit(config)
    config.quantization_config = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    assert is_4bit(config)
    config.quantization_config = {"bits": 8}
    assert not is_4bit(config)
