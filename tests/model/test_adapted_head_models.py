"""LoRA on the output head, as PEFT makes it: the loss without logits, tied or not, under autocast or not, logits on demand."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import fxfuse
from fxfuse.validation import LIMITS, error_ratio
from tests.model import heads


def adapted(kind: str, dtype: torch.dtype, **options: object) -> nn.Module:
    torch.manual_seed(2)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "lm_head"], init_lora_weights=False, **options)  # type: ignore
    return get_peft_model(heads.model_of(kind).to(dtype), config)


def step(model: nn.Module, autocast: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**heads.batch()).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and "lm_head" in n]


@pytest.mark.parametrize(("kind", "dtype", "autocast"), [
    ("llama", torch.float32, True), pytest.param("qwen3", torch.float32, False, marks=pytest.mark.slow),
    pytest.param("llama", torch.float32, False, marks=pytest.mark.slow),
    pytest.param("llama", torch.bfloat16, False, marks=pytest.mark.slow),
])
def test_adapters_on_the_head(kind: str, dtype: torch.dtype, autocast: bool) -> None:
    eager = adapted(kind, dtype)
    truth_loss, truth = step(copy.deepcopy(eager).double(), False)
    eager_loss, others = step(eager, autocast)
    ours = fxfuse.optimize(adapted(kind, dtype), rules=("linear_loss", "lora_linear"), strict=True)
    loss, gradients = step(ours, autocast)
    assert fxfuse.report(ours).assert_fused("linear_loss") is None
    assert len(gradients) == 2
    assert error_ratio(loss, eager_loss, truth_loss) <= LIMITS[torch.bfloat16]
    for a, b, t in zip(gradients, others, truth, strict=True):
        assert error_ratio(a, b, t) <= LIMITS[torch.bfloat16 if autocast or dtype == torch.bfloat16 else a.dtype]


def test_logits_are_had_on_demand_with_the_adapter_in_them() -> None:
    eager = adapted("llama", torch.float32)
    ours = fxfuse.optimize(copy.deepcopy(eager), rules=("linear_loss", "lora_linear"), strict=True)
    a, b = ours(**heads.batch()), eager(**heads.batch())
    torch.testing.assert_close(a.logits.float(), b.logits.float())
    with eager.disable_adapter(), ours.disable_adapter():
        torch.testing.assert_close(ours(**heads.batch()).loss, eager(**heads.batch()).loss)
    torch.testing.assert_close(ours(**heads.batch()).loss, b.loss)
