"""A forward without gradients in training mode rounds as training does: a policy and its reference with the same weights are equal,
bit for bit, whatever of the model is adapted. (tests/gpu/test_policy_and_reference.py: the same of GPU kernels.)
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import fxfuse
from tests.model.builders import gpt2, llama, qwen3, tokens


def adapted(targets: list[str] | str) -> nn.Module:
    return get_peft_model(llama(2), LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).train()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "all weights": lambda: llama(2),
    "all weights, norms of queries and keys": lambda: qwen3(2),
    "biases, plain sums": lambda: gpt2(2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "adapters on two projections": lambda: adapted(["q_proj", "v_proj"]),
    "adapters on all": lambda: adapted("all-linear"),
}


@pytest.mark.parametrize("make", MODELS)
def test_a_policy_equals_its_reference(make: str) -> None:
    torch.use_deterministic_algorithms(False)  # or products would be left as they are
    model = fxfuse.optimize(MODELS[make]().bfloat16())
    for length in (24, 17):
        with torch.no_grad():
            reference = model(**tokens(2, length), use_cache=False).logits
        output = model(**tokens(2, length), use_cache=False)
        assert torch.equal(output.logits, reference)
        output.loss.backward()
