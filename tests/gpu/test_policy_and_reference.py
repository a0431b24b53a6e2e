"""A policy and its reference with the same weights have the same outputs, bit for bit: DPO begins at the logarithm of 2."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import fxfuse

LENGTH = 1024


def adapted(checkpointed: bool, targets: str | list[str]) -> PeftModel:
    """Four layers with a trained adapter and a copy of it, in training mode."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=8,
                         vocab_size=1024)  # fmt: skip
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    adapter = LoraConfig(r=16, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(model, adapter)
    model.add_adapter("reference", adapter)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if ".reference." in name:
            parameter.data.copy_(parameters[name.replace(".reference.", ".default.")])
    model.set_adapter("default")
    if checkpointed:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
    return model.train()


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("without", ["another adapter", "adapters off"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]], ids=["all", "two"])
def test_a_policy_equals_its_reference(targets: str | list[str], without: str, checkpointed: bool) -> None:
    model = adapted(checkpointed, targets)
    if without == "adapters off":
        for name, parameter in model.named_parameters():
            if "lora_B.default" in name:
                parameter.data.zero_()
    fused = fxfuse.optimize(model)
    for length in (LENGTH - 1, LENGTH, LENGTH - 1):
        ids = torch.randint(0, 1024, (4, length), device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            policy = fused.model.model(input_ids=ids).last_hidden_state
            with torch.no_grad():
                if without == "adapters off":
                    with fused.disable_adapter():
                        reference = fused.model.model(input_ids=ids).last_hidden_state
                else:
                    fused.set_adapter("reference")
                    reference = fused.model.model(input_ids=ids).last_hidden_state
                    fused.set_adapter("default")
        assert torch.equal(policy, reference), f"{(policy != reference).float().mean():.1%} of the numbers differ at length {length}"
        policy.float().sum().backward()
