"""Tiny transformers models with PEFT adapters on every linear: losses and gradients against float64; the life of an adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse.validation import error_ratio
from tests.model import builders as build

peft = pytest.importorskip("peft")

PACKED = dict(num_attention_heads=4, num_key_value_heads=2)
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": build.llama,
    "qwen3": build.qwen3,
    "gemma2": build.gemma2,
    "qwen2": lambda: build.causal_lm("qwen2"),  # biases on q, k and v
    "phi3": lambda: build.causal_lm("phi3"),  # packed qkv and gate_up
    "gpt_neox": lambda: build.causal_lm("gpt_neox", use_parallel_residual=True),  # parallel blocks, packed qkv, biases
    "phi": lambda: build.causal_lm("phi"),  # parallel blocks, biases
    "gpt2": build.gpt2,  # transposed weights
    "olmo2": lambda: build.causal_lm("olmo2"),  # norms after the blocks
    "bert": build.bert,
}
QUICK = ("qwen2", "phi3", "gpt_neox")


def adapted(model: nn.Module, dtype: torch.dtype = torch.bfloat16, **options: Any) -> nn.Module:
    """PEFT's LoRA on all linears, B filled so that it matters."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **options)
    wrapped = peft.get_peft_model(model.to(dtype), config, autocast_adapter_dtype=False)
    fill(wrapped)
    return wrapped.train()


def fill(model: nn.Module, std: float = 0.05) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=std)


def step(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(2)
    loss = model(**batch).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def judged(ours: dict[str, Tensor], eager: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """As near to float64 as eager: each gradient within what rounding scatters, and all of them together."""
    assert set(ours) == set(eager) == set(truth)
    found = {name: error_ratio(ours[name], eager[name], truth[name]) for name in ours if name != "loss"}
    assert max(found.values()) < 3, max(found, key=found.__getitem__)
    assert sum(found.values()) / len(found) < 1.3
    assert abs(ours["loss"] - truth["loss"]) < 0.02 * truth["loss"].abs()


def compared(make: Callable[[], nn.Module], batch: dict[str, Tensor]) -> fxfuse.Report:
    model = make()
    truth = step(copy.deepcopy(model).double(), batch)
    eager = step(copy.deepcopy(model), batch)
    fxfuse.optimize(model, strict=True, remainder="eager")
    judged(step(model, batch), eager, truth)
    return fxfuse.report(model)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_every_linear_adapted(name: str) -> None:
    report = compared(lambda: adapted(MODELS[name]()), build.tokens())
    assert report.count("lora_linear") >= 8
    assert report.count("lora_linear", "declined") == 0
    assert {site.implementation for site in report.named("lora_linear")} <= {"addmm_", "augmented"}
    if name not in ("gpt2", "gpt_neox", "phi3"):  # these pack their projections
        report.assert_fused("shared_input_linears")


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    dict(lora_dropout=0.1), dict(use_rslora=True), dict(use_dora=True), dict(lora_bias=True), dict(modules_to_save=["lm_head"]),
], ids=str)  # fmt: skip
def test_variants(options: dict[str, Any]) -> None:
    compared(lambda: adapted(build.llama(), **options), build.tokens())


@pytest.fixture
def compilations() -> Iterator[list[int]]:
    """Grows with each graph that is compiled."""
    import fxfuse.backend as backend

    made: list[int] = []
    original = backend.new_record

    def counted() -> Any:
        made.append(1)
        return original()

    backend.new_record = counted
    yield made
    backend.new_record = original


def test_the_life_of_an_adapter(compilations: list[int]) -> None:
    """Every state is right, and one that was seen before compiles nothing."""
    model, batch = adapted(build.llama(layers=1), torch.float32), build.tokens()
    fxfuse.optimize(model, strict=True, remainder="eager")

    def right() -> dict[str, Tensor]:
        ours = step(model, batch)
        other = copy.deepcopy(model)
        fxfuse.restore(other)
        for name, eager in step(other, batch).items():
            torch.testing.assert_close(ours[name], eager, rtol=2e-3, atol=2e-4 * float(eager.abs().max()) + 1e-7, msg=name)
        return ours

    first = right()
    model.add_adapter("second", peft.LoraConfig(r=8, lora_alpha=4, target_modules="all-linear"))
    fill(model, 0.1)
    model.set_adapter("second")
    second = right()
    assert not torch.allclose(first["loss"], second["loss"])
    model.base_model.set_adapter(["default", "second"])
    right()
    model.set_adapter("default")
    right()  # new: beside another adapter
    made = len(compilations)
    model.set_adapter("second")
    again = right()
    torch.testing.assert_close(again["loss"], second["loss"], rtol=1e-6, atol=1e-7)
    assert len(compilations) == made
    fill(model, 0.2)  # the same adapter with other values: nothing stale
    assert not torch.allclose(right()["loss"], second["loss"])
    with model.disable_adapter():
        assert "loss" in {"loss": model(**batch).loss}
    model.merge_adapter()
    merged = model(**batch).loss.detach()
    model.unmerge_adapter()
    torch.testing.assert_close(model(**batch).loss.detach(), merged, rtol=1e-3, atol=1e-3)
    made = len(compilations)
    right()
    assert len(compilations) == made
