"""Two processes, eager and fused, by gloo: gradients averaged (DDP), weights sharded (FSDP2), adapters, 4-bit weights in shards.

Slow-marked but for one: each process imports and compiles for itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fxfuse
from tests.model import builders as build
from tests.model.as_accelerate_shards import as_accelerate_shards
from tests.model.quantized_models import in_4bit, with_adapters
from tests.model.trainer_twins import Texts, arguments, padded
from tests.model.two_processes import in_two_processes, losses_of

MODELS: dict[str, Callable[[], nn.Module]] = {
    "lora, one layer": lambda: build.with_lora(build.llama(1)),
    "full": lambda: build.llama(),
    "lora": lambda: build.with_lora(build.llama()),
    "qlora": lambda: with_adapters(in_4bit(build.llama(), quant_storage=torch.float32)),
}


def data_parallel(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    body = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in body.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS = {"ddp": data_parallel, "fsdp2": sharded, "accelerate": as_accelerate_shards}


def curve(model: nn.Module, rank: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of this rank's batches in a few steps, and the trained weights, whole."""
    losses = losses_of(model, rank)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return losses, {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in trained.items()}


def compare(rank: int, port: int, name: str, wrappers: Sequence[str], failures: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for wrapper in wrappers:
        plain = fxfuse.optimize(MODELS[name](), validate="off", remainder="eager", strict=True)
        ours, theirs = (curve(WRAPPERS[wrapper](model), rank) for model in (plain, MODELS[name]()))
        report = fxfuse.report(plain)
        for loss, want in zip(ours[0], theirs[0], strict=True):
            if abs(loss - want) > 2e-5 * want:
                failures.put(f"rank {rank}, {wrapper}: losses {ours[0]}, eager's {theirs[0]}")
        for path, want in theirs[1].items():
            if not (ours[1][path] - want).norm() <= 2e-5 * want.norm():
                failures.put(f"rank {rank}, {wrapper}: {path}")
        if report.count("rms_norm") == 0 or report.errors or any("eager" in note for note in report.notes):
            failures.put(f"rank {rank}, {wrapper}: {report}")
    dist.destroy_process_group()


def test_adapters_on_few_layers() -> None:
    """What CI runs."""
    assert in_two_processes(compare, "lora, one layer", ("ddp", "fsdp2", "accelerate")) == []


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "lora, one layer"])
def test_two_processes(name: str, wrapper: str) -> None:
    assert in_two_processes(compare, name, (wrapper,)) == []


def train(rank: int, port: int, folder: str, failures: Any) -> None:
    """transformers' trainer in two processes: its DDP, its count of tokens over all ranks."""
    from transformers import Trainer

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    logs = []
    for fused in (True, False):
        model = build.with_lora(build.llama())
        if fused:
            model = fxfuse.optimize(model, validate="off", remainder="eager", strict=True)
        settings = arguments(Path(folder), gradient_accumulation_steps=2, ddp_backend="gloo")
        trainer = Trainer(model, settings, data_collator=padded, train_dataset=Texts([12, 5, 9, 16, 7, 11, 14, 6] * 4))
        trainer.train()
        logs.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        if fused and fxfuse.report(model).count("rms_norm") == 0:
            failures.put(f"rank {rank}: {fxfuse.report(model)}")
    if rank == 0 and not (len(logs[0]) == 4 and logs[0] == pytest.approx(logs[1], rel=2e-5)):
        failures.put(f"losses {logs[0]}, eager's {logs[1]}")


@pytest.mark.slow
def test_the_trainer_in_two_processes(tmp_path: Path) -> None:
    assert in_two_processes(train, str(tmp_path)) == []
