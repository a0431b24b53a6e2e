"""Gated MLPs with adapters in tiles of rows: milliseconds of forward and backward, and the peak beside the predicted one.

    python benchmarks/tiles.py [--tokens 8192] [--out FILE] [--dry]

A row is one shape, one plan and one number of tiles. ``peak_mib`` is what forward and backward add at most to weights and input,
``forward_mib_backward_mib`` what the tile pass says of either graph, ``untiled_mib`` what it says of them before. The plan ``again``
computes gate and up again in the backward.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not benchmarks/: this folder's names are also packages

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from fxfuse.backend import Backend  # noqa: E402
from fxfuse.memory.tiles import TileReport, planned, tile  # noqa: E402

SHAPES = {"7b": (3584, 18944), "8b": (4096, 14336)}
COUNTS = (1, 2, 3, 4, 6, 8)
# Products by the names that they have in the joint graph; names that it does not have say nothing.
PLANS = {"kept": "", "again": "recompute:mm,mm_1,mm_2,addmm,addmm_1"}
RANK = 16
MIB = 2**20


class Adapted(nn.Module):
    """A frozen linear and its adapter, as PEFT writes them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5, requires_grad=False)
        self.a, self.b = nn.Parameter(torch.randn(RANK, inputs) * 0.02), nn.Parameter(torch.randn(outputs, RANK) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight) + nn.functional.linear(nn.functional.linear(x, self.a), self.b) * 2.0


class GatedMLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.norm.weight.requires_grad_(False)
        self.gate, self.up, self.down = Adapted(width, hidden), Adapted(width, hidden), Adapted(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


def compiled(module: nn.Module, plan: str, count: int, reports: list[TileReport]) -> Any:
    """The module under a plan and so many tiles; ``reports`` are of its forward and backward graph."""
    text = ";".join([part for part in (plan, f"tiles:{count}" if count > 1 else "") if part]) or "keep"

    def recording(gm: torch.fx.GraphModule, **options: Any) -> TileReport:
        reports.append(tile(gm, **options))
        return reports[-1]

    planned.tile = recording
    torch._dynamo.reset()
    return torch.compile(module, backend=Backend(remainder="eager", plan=text, validate="off"), dynamic=True, fullgraph=True)


def run(module: nn.Module, step: Any, x: Tensor, g: Tensor, reps: int) -> dict[str, float]:
    """Medians of forward and backward together; the peak beyond what is there before."""
    cuda = x.is_cuda
    times = []
    for i in range(reps + 3):
        x.grad = None
        for parameter in module.parameters():
            parameter.grad = None
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        step(x).backward(g)
        if cuda:
            torch.cuda.synchronize()
        if i >= 3:
            times.append(1000 * (time.perf_counter() - start))
    peak = (torch.cuda.max_memory_allocated() - before) / MIB if cuda else 0.0
    return {"ms": statistics.median(times), "ms_min": min(times), "peak_mib": peak}


def gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    return [x.grad.float(), *(p.grad.float() for p in module.parameters() if p.grad is not None)]  # type: ignore[union-attr]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--tokens", type=int, default=8192)
    options.add_argument("--reps", type=int, default=20)
    options.add_argument("--shapes", default=",".join(SHAPES))
    options.add_argument("--out", type=Path)
    options.add_argument("--dry", action="store_true", help="tiny shapes on the CPU")
    given = options.parse_args()
    device = "cpu" if given.dry else "cuda"
    for name in given.shapes.split(","):
        width, hidden = (32, 112) if given.dry else SHAPES[name]
        tokens, reps = (512, 1) if given.dry else (given.tokens, given.reps)
        torch.manual_seed(0)
        with torch.device(device):
            torch.set_default_dtype(torch.bfloat16)
            module = GatedMLP(width, hidden)
            x, g = torch.randn(2, tokens // 2, width).requires_grad_(), torch.randn(2, tokens // 2, width)
        first: list[Tensor] = []
        for plan, text in PLANS.items():
            for count in COUNTS:
                reports: list[TileReport] = []
                row = run(module, compiled(module, text, count, reports), x, g, reps)
                found = gradients(module, x)
                first = first or found
                apart = max(float((a - b).norm() / b.norm()) for a, b in zip(found, first, strict=True))
                row = {"workload": f"mlp_{name}", "tokens": tokens, "plan": plan, "tiles": count, **row, "apart": apart,
                       "forward_mib_backward_mib": [round(report.bytes_after / MIB) for report in reports],
                       "untiled_mib": [round(report.bytes_before / MIB) for report in reports],
                       "parts": [report.segments for report in reports]}  # fmt: skip
                print(json.dumps(row), flush=True)
                if given.out is not None:
                    with given.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
