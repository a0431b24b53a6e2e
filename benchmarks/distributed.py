"""Llama-3.1-8B with adapters on one GPU, on two by DDP and on two by FSDP2: fused against unfused.

    torchrun --standalone --nproc-per-node 2 benchmarks/distributed.py [--modes lora,qlora] [--layers 8] [--deadline 235]
    torchrun --standalone --nproc-per-node 2 benchmarks/distributed.py --cpu --tiny    # gloo, to see that it runs

Random weights, bfloat16 adapters of rank 16 on every linear (``lora``: bfloat16 base; ``qlora``: NF4 stored as bfloat16, as FSDP2
asks for), b2 s4096 a device, layers checkpointed as trainers do. A process builds one model a mode and runs on it, in this order and
each time from the same adapters: eager on one GPU and by DDP; fused on one and by DDP; then sharded, fused, and after
``fxfuse.restore`` eager. Both processes warm up "one GPU"; rank 0 alone is timed there, while the other waits without touching its GPU.

A row: milliseconds a step (the slower rank's median), tokens a second of all ranks, peak memory (the larger), loss of each step
(mean over ranks), gradient norm of the warm-up steps (whole gradient, averaged over ranks), and what the report says was fused.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    importlib.import_module("benchmarks")
    del sys.path[0]  # its folder `kernels` would pass for the package of that name, which bitsandbytes tries
    if importlib.util.find_spec("fxfuse") is None:
        sys.path.insert(0, str(ROOT))
# NVLink multicast can put the GPUs of a shared host out of service: it stays off in whatever starts this.
for name, value in dict(NCCL_NVLS_ENABLE="0", TORCH_SYMM_MEM_DISABLE_MULTICAST="1", NVSHMEM_DISABLE_NVLS="1").items():
    os.environ[name] = value

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks import peers, rows  # noqa: E402
from benchmarks.training_steps import GIB, Stopwatch  # noqa: E402
from benchmarks.workloads import WORKLOADS, Workload, batches, build_base, draw_adapters  # noqa: E402

KINDS = ("one", "ddp", "fsdp2")
BASE = replace(WORKLOADS["W2"], name="distributed")


@dataclass
class Process:
    """This rank, and a group by which ranks agree without their GPUs."""

    rank: int
    world: int
    device: str
    control: Any
    until: float  # time.monotonic() at which no further run begins

    def together(self) -> None:
        dist.barrier(group=self.control)

    def gathered(self, value: Any) -> list[Any]:
        """``value`` of every rank."""
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value, group=self.control)
        return found

    def time_is_up(self, needed: float) -> bool:
        """By rank 0's clock, so that all leave together."""
        return bool(self.gathered(time.monotonic() + needed > self.until)[0])


def start(args: argparse.Namespace) -> Process:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cuda = torch.cuda.is_available() and not args.cpu
    until = time.monotonic() + args.deadline
    if not cuda:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        return Process(rank, world, "cpu", dist.group.WORLD, until)
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", timeout=timedelta(seconds=120), device_id=torch.device("cuda", rank))
    return Process(rank, world, "cuda", dist.new_group(backend="gloo"), until)


def build(workload: Workload, device: str) -> Any:
    """The model with adapters in bfloat16, which is the one dtype that FSDP2 gathers a layer in."""
    model = peers.with_adapters(build_base(workload, device, quant_storage=torch.bfloat16), workload)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    draw_adapters(model)
    return model.train()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def remembered(model: nn.Module) -> Callable[[], None]:
    """What sets the adapters (whole or in shards) back to what they are now."""
    before = [parameter.detach().clone() for parameter in trainable(model)]

    @torch.no_grad()
    def back() -> None:
        for parameter, value in zip(trainable(model), before, strict=True):
            parameter.copy_(value)
            parameter.grad = None

    return back


def shard(model: nn.Module, process: Process) -> None:
    """FSDP2: every layer, then what is left, over all ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(process.device, (process.world,))
    for layer in peers.decoder_layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def wrapped(model: nn.Module, kind: str, process: Process) -> nn.Module:
    """What is called in a step; a sharded model is itself."""
    if kind != "ddp":
        return model
    devices = [process.rank] if process.device == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=devices)


def gradient_norm(parameters: list[nn.Parameter], process: Process) -> float:
    """Of the whole gradient; a sharded one is summed over the ranks."""
    squares, sharded = torch.zeros((), dtype=torch.float64), False
    for parameter in parameters:
        gradient: Any = parameter.grad
        sharded |= hasattr(gradient, "to_local")
        local: Tensor = gradient.to_local() if hasattr(gradient, "to_local") else gradient
        squares += torch.linalg.vector_norm(local, dtype=torch.float32).double().square().cpu()
    if sharded:
        dist.all_reduce(squares, group=process.control)
    return squares.sqrt().item()


def measure(model: nn.Module, kind: str, workload: Workload, process: Process, args: argparse.Namespace) -> dict[str, Any]:
    """One run, as rank 0 is to write it; the same on every rank."""
    called = wrapped(model, kind, process)
    parameters = trainable(model)
    cuda = process.device == "cuda"
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=cuda)
    ids = batches(workload, process.device, count=2 * process.world)
    mine = ids if kind == "one" else ids[process.rank :: process.world]
    losses: list[Tensor] = []
    norms: list[float] = []

    def step(index: int, norm: bool) -> None:
        loss = called(input_ids=mine[index % len(mine)], labels=mine[index % len(mine)]).loss
        loss.backward()
        if norm:
            norms.append(gradient_norm(parameters, process))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())

    peak, watch = 0, Stopwatch(cuda)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    began = time.perf_counter()
    for index in range(args.warmup):
        step(index, norm=True)
        if index == 0:
            first = time.perf_counter() - began
    alone = kind == "one" and process.rank != 0
    process.together()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for index in range(args.warmup, args.warmup + (0 if alone else args.steps)):
        with watch.step():
            step(index, norm=False)
    times = watch.ms() if not alone else []
    if cuda:
        peak = torch.cuda.max_memory_allocated()
    process.together()
    found = process.gathered(dict(times=times, losses=[loss.item() for loss in losses], norms=norms, first=first, peak=peak))
    return columns([each for each in found if each["times"]], workload)


def columns(ranks: list[dict[str, Any]], workload: Workload) -> dict[str, Any]:
    """Of the ranks that were timed."""
    ms = max(statistics.median(each["times"]) for each in ranks)
    peak = max(each["peak"] for each in ranks)
    return dict(
        devices=len(ranks),
        ms=round(ms, 2),
        ms_min=round(min(min(each["times"]) for each in ranks), 2),
        ms_max=round(max(max(each["times"]) for each in ranks), 2),
        tokens_s=round(len(ranks) * workload.tokens / ms * 1e3, 1),
        peak_gib=round(peak / GIB, 3) if peak else None,
        first_step_s=round(max(each["first"] for each in ranks), 2),
        losses=[round(statistics.fmean(step), 5) for step in zip(*(each["losses"] for each in ranks), strict=True)],
        grad_norms=[statistics.fmean(step) for step in zip(*(each["norms"] for each in ranks), strict=True)],
    )


def fused_by(model: nn.Module, process: Process) -> dict[str, Any]:
    """Sites by rule that were fused, and whether every rank fused the same."""
    import fxfuse

    report = fxfuse.report(model)
    fused: Counter[str] = Counter()
    for site in report.sites:
        if site.status == "fused":
            fused[site.rule] += site.count
    left = sorted({f"{site.rule}: {site.reason.splitlines()[0][:160]}" for site in report.sites
                   if site.status == "declined" and site.reason})  # fmt: skip
    everyone = process.gathered(dict(fused))
    return dict(fused=dict(sorted(fused.items())), ranks_agree=all(each == everyone[0] for each in everyone), declined=left,
                notes=[note[:200] for note in report.notes], report_errors=[error[:300] for error in report.errors])  # fmt: skip


class Mode:
    """The runs of one mode on one model, in an order that needs no second build."""

    def __init__(self, workload: Workload, process: Process, args: argparse.Namespace, write: Callable[..., None]) -> None:
        self.workload, self.process, self.args, self.write = workload, process, args, write
        began = time.perf_counter()
        self.model = build(workload, process.device)
        self.build_s = time.perf_counter() - began
        self.back = remembered(self.model)
        self.last = 0.0

    def run(self, kind: str, contender: str) -> None:
        if kind not in self.args.kinds.split(",") or self.process.time_is_up(self.last):
            return
        began = time.perf_counter()
        self.back()
        gc.collect()
        found = measure(self.model, kind, self.workload, self.process, self.args)
        self.last = time.perf_counter() - began
        if contender == "fxfuse":
            found |= fused_by(self.model, self.process)
        if self.process.rank == 0:
            self.write(kind="run", mode=self.workload.mode, placed=kind, contender=contender, workload=self.workload.describe(),
                       whole=not (self.workload.layers or self.workload.tiny), build_s=round(self.build_s, 1),
                       seconds=round(self.last, 1), **found)  # fmt: skip

    def all(self) -> None:
        import fxfuse

        self.run("one", "hf")
        self.run("ddp", "hf")
        fxfuse.optimize(self.model, strict=True)
        self.run("one", "fxfuse")
        self.run("ddp", "fxfuse")
        self.back()
        shard(self.model, self.process)
        self.back = remembered(self.model)
        self.run("fsdp2", "fxfuse")
        fxfuse.restore(self.model)
        self.run("fsdp2", "hf")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", default="lora,qlora")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--layers", type=int, default=0, help="0: as the model has them")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--kept", action="store_true", help="layers are not checkpointed")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--deadline", type=float, default=235, help="seconds after which no run begins")
    parser.add_argument("--out", default=str(rows.RESULTS / "distributed.jsonl"))
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    process = start(args)
    writer = rows.Writer(args.out) if process.rank == 0 else None

    def write(**row: Any) -> None:
        if writer is not None:
            writer.write(**row)
            shown = {name: row.get(name) for name in ("mode", "placed", "contender", "ms", "tokens_s", "peak_gib", "first_step_s",
                                                      "losses", "grad_norms", "fused", "notes", "seconds")}  # fmt: skip
            sys.stdout.write(f"{shown}\n")
            sys.stdout.flush()

    shape: dict[str, Any] = dict(batch=args.batch, length=args.length, layers=args.layers, checkpointed=not args.kept)
    if args.tiny:
        shape |= dict(tiny=True, layers=args.layers or 2, length=min(args.length, 32))
    for mode in args.modes.split(","):
        Mode(replace(BASE, mode=mode, **shape), process, args, write).all()
        gc.collect()
    process.together()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
