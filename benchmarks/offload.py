"""Offload to pinned host memory: how fast copies are, what a tensor costs the host, what a stack of blocks gains and loses.

    python -m benchmarks.offload --out results.jsonl            # on a GPU
    python -m benchmarks.offload --dry                          # without one: tiny, the numbers mean nothing

Rows: ``op`` "copies" (GB/s out, back, and of both at once), "host" (microseconds of a tensor out and back, seconds until the pool is
filled), "stack" (a stack of residual blocks at two points, with what it saves on the device and on the host).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fxfuse.memory.host_pool import default_limit
from fxfuse.memory.offload_runtime import transfers
from tests.offloading import Stack, compiled_blocks

GIB = 1 << 30


def seconds(run: Callable[[], object], times: int = 5) -> float:
    """Of one call, the device idle before and after; the median."""
    taken = []
    for _ in range(times):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def copies(device: torch.device, size: int) -> dict[str, Any]:
    """GB/s of copies of ``size`` bytes, on a stream each way."""
    near = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2)]
    far = [torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda") for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)] if device.type == "cuda" else [None, None]

    def both(out: bool, back: bool) -> None:
        for _ in range(4):
            for wanted, stream, target, source in ((out, streams[0], far[0], near[0]), (back, streams[1], near[1], far[1])):
                if wanted:
                    with torch.cuda.stream(stream):
                        target.copy_(source, non_blocking=True)

    rate = {name: 4 * size / seconds(lambda way=way: both(*way)) / 1e9
            for name, way in (("out", (True, False)), ("back", (False, True)), ("each_of_both", (True, True)))}
    return {"op": "copies", "mib": size >> 20, **{f"{name}_gb_s": round(value, 2) for name, value in rate.items()}}


def host(device: torch.device, size: int, count: int) -> dict[str, Any]:
    """Microseconds the host spends for a tensor out and back again, once the pool is filled; how long filling it takes."""
    traffic = transfers(device)
    tensors = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2)]

    def there_and_back() -> tuple[float, float]:
        start = time.perf_counter()
        kept = [traffic.send(tensors[i % 2], 0, 1) for i in range(count)]
        middle = time.perf_counter()
        while kept:
            traffic.take(kept.pop())
        return middle - start, time.perf_counter() - middle

    before = traffic.pool.bytes
    filling = there_and_back()[0]
    filled = traffic.pool.bytes - before
    synchronize()
    best = []
    for _ in range(5):
        best.append(there_and_back())
        synchronize()
    out, back = (min(pair[i] for pair in best) for i in range(2))
    return {"op": "host", "mib": size / (1 << 20), "send_us": round(out / count * 1e6, 1), "take_us": round(back / count * 1e6, 1),
            "fill_s_gib": round(filling / max(filled, 1) * GIB, 3), "pool_limit_gib": round(default_limit() / GIB, 1)}


def stack(device: torch.device, depth: int, width: int, rows: int, dtype: torch.dtype, recompute: bool, offload: bool
          ) -> dict[str, Any]:  # fmt: skip
    """A step of a stack of blocks with frozen weights."""
    torch.manual_seed(0)
    with torch.device(device):
        model = compiled_blocks(Stack(depth, width).to(dtype), offload=offload, recompute=recompute)
    model.requires_grad_(False)
    x = torch.randn(2, rows, width, device=device, dtype=dtype, requires_grad=True)

    def step() -> None:
        x.grad = None
        model(x).float().square().mean().backward()

    traffic = transfers(device)
    counts = traffic.counts
    start = time.perf_counter()
    step()
    synchronize()
    first = time.perf_counter() - start
    before, late = counts.sent_bytes, counts.late
    base = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ms = seconds(step, 7) * 1e3
    row = {"op": "stack", "depth": depth, "width": width, "tokens": 2 * rows, "recompute": recompute, "offload": offload,
           "ms": round(ms, 2), "sent_gib": round((counts.sent_bytes - before) / 7 / GIB, 3), "late": counts.late - late,
           "first_step_s": round(first, 2)}  # fmt: skip
    if device.type == "cuda":
        row["peak_gib"] = round((torch.cuda.max_memory_allocated() - base) / GIB, 3)
        row["reserved_gib"] = round(torch.cuda.memory_reserved() / GIB, 3)
    traffic.clear()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="append rows to this file")
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU")
    given = parser.parse_args()
    device = torch.device("cpu") if given.dry else torch.device("cuda", torch.cuda.current_device())
    sizes = [1 << 12] if given.dry else [1 << 20, 16 << 20, 64 << 20, 256 << 20]
    rows = [copies(device, size) for size in sizes]
    rows += [host(device, size, 4 if given.dry else 24) for size in sizes[:1] + ([] if given.dry else [64 << 20])]
    shape = (3, 16, 8, torch.float32) if given.dry else (16, 4096, 4096, torch.bfloat16)
    rows += [stack(device, *shape, recompute, offload) for recompute in (True, False) for offload in (False, True)]
    gpu = "cpu" if given.dry else torch.cuda.get_device_name()
    for row in rows:
        line = json.dumps(row | {"gpu": gpu, "torch": torch.__version__})
        print(line, flush=True)
        if given.out:
            with given.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
