"""FSDP1 (``FullyShardedDataParallel``) in two processes: fused with ``use_orig_params``, declined by name without it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

import fxfuse
from tests.model import builders as build
from tests.model.two_processes import in_two_processes, losses_of


def sharded(model: nn.Module, original: bool) -> nn.Module:
    """A unit for every layer and one for the rest, as accelerate and the trainer wrap."""
    layers = {type(module) for name, module in model.named_modules() if name.endswith("layers.0")}
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=layers)
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=original, device_id=torch.device("cpu"))


def compare(rank: int, port: int, adapted: bool, original: bool, failures: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)

    def make() -> nn.Module:
        return build.with_lora(build.llama(1)) if adapted else build.llama(1)

    model = fxfuse.optimize(make(), validate="off", remainder="eager")
    ours, theirs = (losses_of(sharded(each, original), rank) for each in (model, make()))
    report = fxfuse.report(model)
    if any(abs(loss - want) > 2e-5 * want for loss, want in zip(ours, theirs, strict=True)):
        failures.put(f"rank {rank}: losses {ours}, eager's {theirs}")
    declined = any("use_orig_params" in note for note in report.notes)
    if report.errors or declined == original or (original and report.count("gated_activation") != 1):
        failures.put(f"rank {rank}: {report}")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("adapted", "original"), [(True, True), (False, False)])
def test_two_processes(adapted: bool, original: bool) -> None:
    assert in_two_processes(compare, adapted, original) == []
