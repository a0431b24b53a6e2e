"""On a GPU in bfloat16: adapters other than LoRA, packed sequences, router logits; as near to float64 as eager is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from tests.model import builders as build
from tests.model.quantized_models import in_4bit

DEVICE = "cuda"
PACK = (40, 70, 18)


def dora(base: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", use_dora=True, init_lora_weights=False)
    return peft.get_peft_model(base, config, autocast_adapter_dtype=False).train()


def adapted(kind: str, base: nn.Module, **options: object) -> nn.Module:
    """Adapters of PEFT's ``kind``, moved off the point from which they change nothing."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    model = peft.get_peft_model(base, getattr(peft, f"{kind}Config")(r=4, **options), autocast_adapter_dtype=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
    return model.train()


def llama(**changes: object) -> nn.Module:
    return build.llama(2, hidden_size=256, intermediate_size=512, **changes).to(torch.bfloat16)


def mixtral(**changes: object) -> nn.Module:
    return build.mixtral(2, hidden_size=256, **changes).to(torch.bfloat16)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "dora": lambda: dora(llama()),
    "dora over 4 bits": lambda: dora(in_4bit(llama(), torch.bfloat16)),
    "loha": lambda: adapted("LoHa", llama(), rank_dropout=0.2, target_modules=["q_proj", "o_proj", "down_proj"]),
    "lokr": lambda: adapted("LoKr", llama(), target_modules=["q_proj", "o_proj", "down_proj"]),
    "experts": lambda: adapted("Lora", mixtral(), target_modules=["q_proj"], target_parameters=["experts.down_proj"]),
    "packed": llama,
    "packed, written out": lambda: llama(attn_implementation="eager"),
    "router logits": lambda: mixtral(output_router_logits=True),
}
OF_EXPERTS = ("router logits", "experts")


def batch(packed: bool) -> dict[str, Tensor]:
    batch = build.tokens(1, sum(PACK))
    if packed:
        positions = torch.cat([torch.arange(length) for length in PACK])[None]
        batch |= {"position_ids": positions, "labels": batch["labels"].masked_fill(positions == 0, -100)}
    return {name: value.to(DEVICE) for name, value in batch.items()}


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Loss and gradients of a step, in one row of float64."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(2)  # (of dropout)
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    found = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat([loss.detach().double()[None], *found])


@pytest.mark.parametrize("name", MODELS)
def test_as_near_to_float64_as_eager(name: str) -> None:
    inputs = batch(name.startswith("packed"))
    model = MODELS[name]().to(DEVICE)
    eager = gradients(model, inputs)
    fxfuse.optimize(model)
    for _ in range(2):
        ours = gradients(model, inputs)
    report = fxfuse.report(model)
    assert report.errors == []
    assert not [note for note in report.notes if "eager" in note], report.notes
    report.assert_fused("rms_norm" if name not in OF_EXPERTS else "rope")
    if "4 bits" in name:  # (its weights have no float64)
        assert (ours - eager).norm() <= 2e-2 * eager.norm()
        return
    wide = MODELS[name]().to(DEVICE)
    exact = gradients(wide.float() if name in OF_EXPERTS else wide.double(), inputs)  # (grouped products have no float64)
    assert ours.shape == exact.shape
    # An expert chosen otherwise by rounding changes more than rounding does, in eager as in ours.
    allowed = 2 * (eager - exact).norm() + (0.05 * exact.norm() if name in OF_EXPERTS else 0)
    assert (ours - exact).norm() <= allowed
