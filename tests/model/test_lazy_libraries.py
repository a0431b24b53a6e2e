"""Libraries around a model whose logits are lazy: accelerate, the trainer of transformers, distributed wrappers."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fxfuse
from fxfuse.errors import OutputContractError
from fxfuse.output_contract.tensor import LazyTensor
from tests.model import builders as build
from tests.model.builders import tokens
from tests.model.giving_up import fused, optimized

MODELS = {"llama": build.llama, "adapters": lambda: build.with_lora(build.llama())}


def notes(model: nn.Module) -> list[str]:
    return [note for note in fxfuse.report(model).notes if "logits" in note]


def close(ours: nn.Module, theirs: nn.Module) -> bool:
    """Gradients equal up to float32 rounding; each is there on both sides or on neither."""
    pairs = [(a.grad, b.grad) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)]
    assert all((a is None) == (b is None) for a, b in pairs)
    return all((a - b).norm() <= 2e-6 * b.norm() for a, b in pairs if a is not None)


class TestAccelerate:
    @pytest.fixture(autouse=True)
    def fresh_state(self) -> Iterator[None]:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(True)
        yield
        AcceleratorState._reset_state(True)

    @pytest.mark.parametrize("precision", ["bf16", "no"])
    @pytest.mark.parametrize("name", ["llama", "adapters"])
    def test_its_conversion_to_float32_reads_nothing(self, precision: str, name: str) -> None:
        from accelerate import Accelerator

        model, eager = optimized(MODELS[name]()), MODELS[name]()
        prepared, other = (Accelerator(mixed_precision=precision, cpu=True).prepare(m) for m in (model, eager))
        for _ in range(2):
            ours, theirs = prepared(**tokens()), other(**tokens())
            assert type(ours.logits) is LazyTensor
            assert ours.logits.dtype == theirs.logits.dtype == torch.float32
            ours.logits.square().mean().backward()
            theirs.logits.square().mean().backward()
            assert torch.equal(ours.logits, theirs.logits)
            assert close(model, eager)

    def test_a_model_that_it_has_prepared_already(self) -> None:
        """Autocast and the conversion stand around the forward before it is captured: looked through, as those that come later."""
        from accelerate import Accelerator

        accelerator = Accelerator(mixed_precision="bf16", cpu=True)
        model, other = optimized(accelerator.prepare(build.llama())), accelerator.prepare(optimized(build.llama()))
        ours, theirs = model(**tokens()), other(**tokens())
        assert type(ours.logits) is LazyTensor
        assert torch.equal(ours.loss, theirs.loss)
        for each in (ours, theirs):
            each.loss.backward()
        assert close(model, other)

    def test_gathering_for_metrics(self) -> None:
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        model, eager = accelerator.prepare(optimized(build.llama())), build.llama()
        out = model(**tokens())
        gathered = accelerator.gather_for_metrics((out.logits.detach(), tokens()["labels"]))
        assert torch.equal(gathered[0], eager(**tokens()).logits)


def test_the_trainer_of_transformers_trains_and_evaluates(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {name: value[0] for name, value in tokens(1, seed=index).items()}

    def metrics(prediction: Any) -> dict[str, float]:
        return {"right": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    def curve(model: nn.Module) -> list[float]:
        arguments = TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True, bf16=True, report_to=[],
            logging_steps=1, eval_strategy="steps", eval_steps=3, save_strategy="no", disable_tqdm=True, seed=0,
        )
        trainer = Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows(), compute_metrics=metrics)
        trainer.train()
        return [float(row[key]) for row in trainer.state.log_history for key in ("loss", "eval_loss", "eval_right") if key in row]

    model = optimized(build.with_lora(build.llama()))
    ours, theirs = curve(model), curve(build.with_lora(build.llama()))
    assert len(ours) == 5
    assert ours == pytest.approx(theirs, rel=2e-3)
    assert "read 0 times (materialised: 0)" in notes(model)[0]


class TestDistributed:
    """One process on the CPU: what the wrappers do to a model and its outputs does not depend on the number."""

    @pytest.fixture(autouse=True)
    def group(self) -> Iterator[None]:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield
        dist.destroy_process_group()

    @pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}], ids=str)
    def test_data_parallel_walks_over_the_outputs(self, options: dict[str, bool]) -> None:
        model, eager = optimized(build.llama()), build.llama()
        ours, theirs = (nn.parallel.DistributedDataParallel(m, **options) for m in (model, eager))
        before = _reads(model)
        for use in ("loss", "logits", "loss"):
            got, want = ours(**tokens()), theirs(**tokens())
            assert type(got.logits) is LazyTensor
            for m, out in ((ours, got), (theirs, want)):
                m.zero_grad()
                (out.loss if use == "loss" else out.logits.square().mean()).backward()
            assert close(model, eager)
        read, computed = _reads(model)
        assert (read - before[0], computed - before[1]) == (1, 1)

    def test_collectives_see_the_value(self) -> None:
        model, eager = optimized(build.llama()), build.llama()
        want = eager(**tokens()).logits.detach()
        logits = model(**tokens()).logits.detach()
        dist.all_reduce(logits, op=dist.ReduceOp.SUM)
        assert torch.equal(logits, want)
        gathered = [torch.empty(want.shape)]
        dist.all_gather(gathered, model(**tokens()).logits.detach())
        assert torch.equal(gathered[0], want)

    def test_fully_sharded(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (1,))

        def sharded(model: nn.Module) -> nn.Module:
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            return fully_shard(model, mesh=mesh)

        model, eager = sharded(optimized(build.llama())), sharded(build.llama())
        before = _reads(model)
        for use in ("loss", "logits", "loss"):
            got, want = model(**tokens()), eager(**tokens())
            assert type(got.logits) is LazyTensor
            for m, out in ((model, got), (eager, want)):
                m.zero_grad()
                (out.loss if use == "loss" else out.logits.square().mean()).backward()
            for a, b in zip(model.parameters(), eager.parameters(), strict=True):
                assert (a.grad.full_tensor() - b.grad.full_tensor()).norm() <= 2e-6 * b.grad.full_tensor().norm()
        read, computed = _reads(model)
        assert (read - before[0], computed - before[1]) == (1, 1)
        with pytest.raises(ValueError, match="already sharded by fully_shard"):
            fxfuse.optimize(sharded(build.llama()))

    def test_a_weight_whose_shards_were_given_back(self) -> None:
        model = optimized(build.llama())
        out = model(**tokens())
        storage = model.lm_head.weight.untyped_storage()
        storage.resize_(0)
        with pytest.raises(OutputContractError, match=r"lm_head.* changed or freed"):
            out.logits.sum()


def train_with_another(rank: int, port: int, failures: Any) -> None:
    """Two processes, other batches in each, gradients averaged: as eager, with and without unused parameters to look for."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for options in ({}, {"find_unused_parameters": True}):
        model, eager = fused(build.llama(1)), build.llama(1)
        ours, theirs = (nn.parallel.DistributedDataParallel(m, **options) for m in (model, eager))
        for use in ("loss", "logits"):
            for m in (ours, theirs):
                m.zero_grad()
                out = m(**tokens(seed=rank))
                (out.loss if use == "loss" else out.logits.square().mean()).backward()
            if not close(model, eager):
                failures.put(f"rank {rank}, {options}, {use}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_average_their_gradients() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    failures = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(train_with_another, (port, failures), nprocs=2)
    assert failures.empty()


def _reads(model: nn.Module) -> tuple[int, int]:
    found = [each for graph in fxfuse.report(model).graphs for each in graph.reads]
    return sum(each.read for each in found), sum(each.materialised for each in found)
