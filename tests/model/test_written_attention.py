"""Models that write their attention out: losses and gradients as in eager, with padding, windows, adapters and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse.attention import execution, hiding
from fxfuse.attention.known_masks import forget_masks
from tests.model.builders import causal_lm, gemma2


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(execution, "SCORES_BYTES", 1)
    monkeypatch.setattr(execution, "STEP", 8)
    monkeypatch.setattr(hiding, "STEP", 4)
    forget_masks()
    torch._dynamo.reset()
    yield
    forget_masks()


def step(model: nn.Module, padding: int) -> list[Tensor]:
    """Loss and gradients for rows of which the second begins with padding."""
    ids = torch.randint(1, 96, (2, 30), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, attention_mask=mask if padding else None, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("padding", [0, 9])
def test_a_soft_cap_and_windows_that_alternate(padding: int) -> None:
    wanted, model = (gemma2(2, attn_implementation="eager") for _ in range(2))
    fxfuse.optimize(model, strict=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for _ in range(2):
        got = step(model, padding)
    for a, b in zip(got, step(wanted, padding), strict=True):
        assert (a - b).norm() <= 2e-5 * b.norm()
    fxfuse.report(model).assert_fused("attention", 2)


def test_eager_attention_of_any_model_under_adapters() -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> nn.Module:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return peft.get_peft_model(causal_lm("llama", 1, attn_implementation="eager"), config)

    wanted, model = adapted(), fxfuse.optimize(adapted(), strict=True)
    for a, b in zip(step(model, 0), step(wanted, 0), strict=True):
        assert (a - b).norm() <= 2e-5 * b.norm()
    fxfuse.report(model).assert_fused("attention")


def test_the_kernel_that_a_model_asks_for_is_left_to_it() -> None:
    model = fxfuse.optimize(causal_lm("llama", 1), strict=True)
    step(model, 0)
    assert not [site for site in fxfuse.report(model).sites if site.rule == "attention"]
