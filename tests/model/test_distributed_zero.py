"""DeepSpeed: ZeRO-3, whose hooks gather weights module by module, is declined by name; ZeRO-2 runs fused, lazy logits and all.

A module of its name and what it leaves on parameters stand in for it; where it is installed (no dependency of ours), the engine itself.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fxfuse
from fxfuse.capture.declines import partitioned
from tests.model import builders as build
from tests.model.builders import tokens
from tests.model.two_processes import in_two_processes

OPTIONS = {"validate": "off", "remainder": "eager"}
SENTENCE = "its weights are partitioned by DeepSpeed's ZeRO-3"


def partition(model: nn.Module) -> None:
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id = number


def loss_and_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    loss = model(**tokens())["loss"]
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("first", ["optimize", "partition"])
def test_weights_in_parts_are_declined_by_name(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As loaded under ZeRO-3's configuration, and as ``initialize`` makes them of a model that is optimized already."""
    model, eager = build.llama(1), build.llama(1)
    monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
    if first == "partition":
        partition(model)
    fxfuse.optimize(model, **OPTIONS)
    partition(model)
    ours, theirs = loss_and_gradients(model), loss_and_gradients(eager)
    for name, want in theirs.items():
        assert (ours[name] - want).norm() <= 2e-5 * want.norm(), name
    report = fxfuse.report(model)
    assert {site.rule for site in report.sites} <= {"rms_norm"}  # the last norm: a leaf's weights are gathered around its call
    said = [note for note in report.notes if SENTENCE in note]
    assert any("layers" in note or "LlamaDecoderLayer" in note for note in said), said
    assert any("LlamaForCausalLM" in note or "top-level" in note for note in said), said


def test_an_engine_is_refused() -> None:
    class DeepSpeedEngine(nn.Sequential):
        __module__ = "deepspeed.runtime.engine"

    with pytest.raises(ValueError, match=r"call fxfuse\.optimize\(model\) before deepspeed\.initialize"):
        fxfuse.optimize(DeepSpeedEngine(build.llama(1)))


def test_without_deepspeed_nothing_is_partitioned() -> None:
    model = build.llama(1)
    partition(model)
    assert partitioned(model) == ""


def test_the_engines_hooks_on_outputs_leave_logits_lazy() -> None:
    model = fxfuse.optimize(build.llama(1, vocab_size=512), **OPTIONS)
    runs: list[torch.Tensor] = []
    hooks: dict[str, Any] = {"__name__": "deepspeed.runtime.utils"}
    exec("def register(output, hook):\n    return output.register_hook(hook)\n", hooks)
    out = model(**tokens())
    for output in (out["loss"], out["logits"]):
        hooks["register"](output, runs.append)
    out["loss"].backward()
    assert len(runs) == 1  # the loss has it too
    with pytest.raises(fxfuse.errors.OutputContractError):
        model(**tokens())["logits"].register_hook(runs.append)


def curve(model: nn.Module, stage: int, rank: int) -> list[float]:
    import deepspeed

    settings = dict(train_micro_batch_size_per_gpu=2, zero_allow_untested_optimizer=True, zero_force_ds_cpu_optimizer=False,
                    zero_optimization=dict(stage=stage, stage3_param_persistence_threshold=0))  # fmt: skip
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
    losses = []
    for number in range(3):
        loss = engine(**tokens(seed=10 * number + rank))["loss"]
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def compare(rank: int, port: int, stage: int, failures: Any) -> None:
    here = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, DS_ACCELERATOR="cpu")
    os.environ.update({name: str(value) for name, value in here.items()})
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.init_distributed("gloo")
    model = fxfuse.optimize(build.with_lora(build.llama(1)), **OPTIONS)
    ours, theirs = curve(model, stage, rank), curve(build.with_lora(build.llama(1)), stage, rank)
    report = fxfuse.report(model)
    if any(abs(loss - want) > 2e-5 * want for loss, want in zip(ours, theirs, strict=True)):
        failures.put(f"rank {rank}: losses {ours}, eager's {theirs}")
    if report.count("gated_activation") != (stage == 2) or any(SENTENCE in note for note in report.notes) != (stage == 3):
        failures.put(f"rank {rank}: {report}")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_the_engine_in_two_processes(stage: int) -> None:
    pytest.importorskip("deepspeed")
    assert in_two_processes(compare, stage) == []
