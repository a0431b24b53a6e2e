"""Checkpointed models: a layer's last projection is not recomputed, with adapters and without, and gradients are eager's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from tests.model.builders import PassThrough, differences, llama, step, t5, tokens

BOTH = pytest.mark.parametrize("reentrant", [False, True], ids=["without reentry", "reentrant"])


def left_out(model: nn.Module) -> list[str]:
    """What the report says of checkpoints."""
    return [note for note in fxfuse.report(model).notes if note.startswith("checkpointing:")]


def agree(got: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def products(model: nn.Module, **inputs: Any) -> int:
    """Matrix products that ran in one backward."""
    loss = model(**inputs).loss
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss.backward()
    return sum(event.name == "aten::mm" for event in profile.events())


@BOTH
def test_six_of_a_layers_seven_products_are_recomputed(reentrant: bool) -> None:
    ids = torch.arange(32).reshape(2, 16)
    inputs = dict(input_ids=ids, labels=ids, use_cache=False)
    kept = fxfuse.optimize(llama(layers=2))
    model = fxfuse.optimize(llama(layers=2))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # trainers do it after optimize
    for _ in range(2):
        once, again = products(kept, **inputs), products(model, **inputs)
    assert again - once == 2 * 6
    agree([p.grad for p in model.parameters()], [p.grad for p in kept.parameters()])
    assert "2 LlamaDecoderLayer blocks" in left_out(model)[0]


@BOTH
def test_adapters_gradients_are_eagers(reentrant: bool) -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> nn.Module:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        model = peft.get_peft_model(llama(layers=1), config)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        return model

    ids = torch.arange(32).reshape(2, 16)
    wanted, model = adapted(), fxfuse.optimize(adapted(), strict=True)
    for each in (wanted, model, wanted, model):
        each(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    agree(*([p.grad for p in each.parameters() if p.requires_grad] for each in (model, wanted)))
    assert "(2 of 21 matrix products)" in left_out(model)[0]


@pytest.mark.parametrize("make", [llama, t5])
def test_a_checkpoint_of_somebody_else_around_blocks_that_write_a_cache(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As accelerate wraps the layers of a sharded model. The backward runs them with the cache that the forward has filled."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        CheckpointWrapper,
        checkpoint_wrapper,
    )

    monkeypatch.setattr("fxfuse.api._backend", lambda *options: PassThrough())
    model, plain = fxfuse.optimize(make()).eval(), make().eval()
    assert model.config.use_cache
    for name, module in list(model.named_modules()):
        if type(module).__name__ in ("LlamaDecoderLayer", "T5Block"):
            model.set_submodule(name, checkpoint_wrapper(module))
    assert any(isinstance(module, CheckpointWrapper) for module in model.modules())
    for seed in range(2):
        ours = {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in step(model, tokens(seed=seed)).items()}
        assert differences(ours, step(plain, tokens(seed=seed))) == []
    assert not [note for note in fxfuse.report(model).notes if "eager" in note]
