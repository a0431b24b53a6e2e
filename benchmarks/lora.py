"""Linears with low-rank adapters: what each way of forming ``W x + s B A x`` and its gradients costs over the base matmuls alone.

    python benchmarks/lora.py [--out FILE] [--dry] [--pieces] [--tokens 8192] [--rank 16]

A row is a group of linears that read one x (one linear, q/k/v, gate/up). ``forward`` and ``both`` (forward, and backward with dX, dA,
dB) in milliseconds; ``base`` is forward and dX of the frozen weights; ``over_base`` is the share by which a way exceeds it.

    peft          as PEFT writes it: separate products, scaled and added by kernels
    addmm_        thin products stacked, sums accumulated in one buffer, thin terms last
    thin_first    the same with thin terms first: wide products are added to them (what fxfuse does without room beside x and W)
    thin_kernels  that, with our kernels for h B', and for dY B and dY' h, where they are faster
    augmented     one matmul over [x, h] and [W, sB], backward over [dY, g] and [W; A]; x, W and dY come with room beside them
    copied        augmented, where W has no room: copied with its tail into scratch for each use
    fxfuse        modules of the group, compiled: what the library makes of it today, launches included
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not benchmarks/: this folder's names are also packages

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks import rows  # noqa: E402

GROUPS = (
    (4096, (4096,)), (4096, (14336,)), (14336, (4096,)), (3584, (18944,)), (18944, (3584,)), (2048, (2048,)), (3584, (3584,)),
    (4096, (4096, 1024, 1024)), (4096, (14336, 14336)), (3584, (3584, 512, 512)), (3584, (18944, 18944)),
)  # fmt: skip
QUICK = ((4096, (4096,)), (4096, (14336,)), (2304, (9216,)), (14336, (4096,)))
SCALE = 2.0
Closure = Callable[[], object]


@dataclass
class Data:
    """One group's tensors: bf16; x [T, K], W_i [N_i, K], A_i [R, K], B_i [N_i, R], dY_i [T, N_i]."""

    x: Tensor
    weights: list[Tensor]
    a: list[Tensor]
    b: list[Tensor]
    dy: list[Tensor]

    @classmethod
    def draw(cls, tokens: int, width: int, outputs: tuple[int, ...], rank: int, device: str) -> Data:
        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, device=device, dtype=torch.bfloat16) * scale

        return cls(normal(tokens, width), [normal(n, width, scale=0.02) for n in outputs],
                   [normal(rank, width, scale=0.02) for _ in outputs], [normal(n, rank, scale=0.02) for n in outputs],
                   [normal(tokens, n) for n in outputs])  # fmt: skip


def base(d: Data) -> tuple[Closure, Closure]:
    def backward() -> Tensor:
        dx = d.dy[0] @ d.weights[0]
        for dy, w in zip(d.dy[1:], d.weights[1:], strict=True):
            dx.addmm_(dy, w)
        return dx

    return lambda: [d.x @ w.t() for w in d.weights], backward


def peft(d: Data) -> tuple[Closure, Closure]:
    hs = [d.x @ a.t() for a in d.a]

    def forward() -> list[Tensor]:
        return [d.x @ w.t() + ((d.x @ a.t()) @ b.t()) * SCALE for w, a, b in zip(d.weights, d.a, d.b, strict=True)]

    def backward() -> Any:
        dx, grads = None, []
        for dy, w, a, b, h in zip(d.dy, d.weights, d.a, d.b, hs, strict=True):
            scaled = dy * SCALE
            g = scaled @ b
            grads += [scaled.t() @ h, g.t() @ d.x]
            for part in (dy @ w, g @ a):
                dx = part if dx is None else dx + part
        return dx, grads

    return forward, backward


def scaled(left: Tensor, right: Tensor, alpha: float) -> Tensor:
    """alpha * left @ right, the factor in the matmul."""
    result = left.new_empty(left.shape[0], right.shape[1])
    return torch.addmm(result, left, right, beta=0, alpha=alpha, out=result)


def added(d: Data, thin_first: bool, kernels: bool = False) -> tuple[Closure, Closure]:
    from fxfuse.products.calls import product, thin_pair

    short = product if kernels else scaled

    rank, count = d.a[0].shape[0], len(d.a)
    h_all = d.x @ torch.cat(d.a).t()

    def forward() -> list[Tensor]:
        h = d.x @ (torch.cat(d.a) if count > 1 else d.a[0]).t()
        if thin_first:
            return [short(h[:, i * rank:(i + 1) * rank], b.t(), SCALE).addmm_(d.x, w.t())
                    for i, (w, b) in enumerate(zip(d.weights, d.b, strict=True))]
        return [(d.x @ w.t()).addmm_(h[:, i * rank:(i + 1) * rank], b.t(), alpha=SCALE)
                for i, (w, b) in enumerate(zip(d.weights, d.b, strict=True))]

    def backward() -> Any:
        g = d.x.new_empty(d.x.shape[0], rank * count)
        grads, dx = [], None
        for i, (dy, w, b) in enumerate(zip(d.dy, d.weights, d.b, strict=True)):
            part, h = g[:, i * rank:(i + 1) * rank], h_all[:, i * rank:(i + 1) * rank]
            if kernels:
                grads.append(thin_pair(g, i * rank, rank * count, dy, b, h, SCALE, SCALE, False)[1])
            else:
                torch.addmm(part, dy, b, beta=0, alpha=SCALE, out=part)
                own = torch.empty_like(b)
                grads.append(torch.addmm(own, dy.t(), h, beta=0, alpha=SCALE, out=own))
            if not thin_first:
                dx = dy @ w if dx is None else dx.addmm_(dy, w)
        if thin_first:
            dx = short(g, torch.cat(d.a) if count > 1 else d.a[0], 1.0)
            for dy, w in zip(d.dy, d.weights, strict=True):
                dx.addmm_(dy, w)
            return dx, grads, g.t() @ d.x
        assert dx is not None
        return dx.addmm_(g, torch.cat(d.a) if count > 1 else d.a[0]), grads, g.t() @ d.x

    return forward, backward


def augmented(d: Data, copied: bool) -> tuple[Closure, Closure]:
    """[x, h1, h2] and [W1, sB1, 0]; backward [dY1, g1, g2] and [W1; A1; A2], the other dY accumulated. Rows as the library has them."""
    from fxfuse.roomy_weights import row_distance

    rank, count = d.a[0].shape[0], len(d.a)
    room, width = rank * count, d.x.shape[1]

    def with_room(matrix: Tensor) -> Tensor:
        rows, columns = matrix.shape
        wide = matrix.new_zeros(rows, row_distance(columns, room))[:, : columns + room]
        wide[:, :columns] = matrix
        return wide

    x, dy, beside = with_room(d.x), with_room(d.dy[0]), [with_room(w) for w in d.weights]
    below = torch.cat([d.weights[0], d.weights[0].new_zeros(room, width)], 0)

    def beside_of(i: int) -> Tensor:
        w = beside[i]
        if copied:
            w = torch.empty_strided(beside[i].shape, beside[i].stride(), dtype=beside[i].dtype, device=beside[i].device)
            w[:, :width].copy_(d.weights[i])
        if count > 1:
            w[:, width:].zero_()
        torch.mul(d.b[i], SCALE, out=w[:, width + i * rank:width + (i + 1) * rank])
        return w

    def forward() -> list[Tensor]:
        torch.mm(x[:, :width], (torch.cat(d.a) if count > 1 else d.a[0]).t(), out=x[:, width:])
        return [x @ beside_of(i).t() for i in range(count)]

    def backward() -> Any:
        first = d.weights[0].shape[0]
        g, grads = dy[:, first:], []
        for i, b in enumerate(d.b):
            part, own = g[:, i * rank:(i + 1) * rank], torch.empty_like(b)
            source = dy[:, :first] if i == 0 else d.dy[i]
            torch.addmm(part, source, b, beta=0, alpha=SCALE, out=part)
            torch.addmm(own, source.t(), x[:, width + i * rank:width + (i + 1) * rank], beta=0, alpha=SCALE, out=own)
            grads.append(own)
        w = torch.empty_like(below) if copied else below
        if copied:
            w[:first].copy_(d.weights[0])
        torch.cat(d.a, out=w[first:])
        dx = dy @ w
        for other, weight in zip(d.dy[1:], d.weights[1:], strict=True):
            dx.addmm_(other, weight)
        return dx, grads, g.t() @ x[:, :width]

    return forward, backward


class Adapted(nn.Module):
    """The group as a model writes it."""

    def __init__(self, d: Data) -> None:
        super().__init__()
        self.base = nn.ParameterList([nn.Parameter(w, requires_grad=False) for w in d.weights])
        self.a = nn.ParameterList([nn.Parameter(a) for a in d.a])
        self.b = nn.ParameterList([nn.Parameter(b) for b in d.b])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        linear = nn.functional.linear
        return tuple(linear(x, w) + linear(linear(x, a), b) * SCALE for w, a, b in zip(self.base, self.a, self.b, strict=True))


def compiled(d: Data) -> tuple[Closure, Closure]:
    from fxfuse.backend import Backend

    torch._dynamo.reset()  # each group has widths of its own: no recompilations of one function
    module, x = Adapted(d), d.x.clone().requires_grad_()
    run = torch.compile(module, backend=Backend(remainder="eager", strict=True), fullgraph=True)
    outputs = run(x)
    wanted = [x, *module.a, *module.b]
    return lambda: run(x), lambda: torch.autograd.grad(outputs, wanted, d.dy, retain_graph=True)


def timed(closures: dict[str, Closure], device: str, rounds: int = 9, inner: int = 5) -> dict[str, float]:
    """Median milliseconds, contenders taking turns in random order."""
    if device == "cpu":
        for closure in closures.values():
            closure()
        return dict.fromkeys(closures, 0.0)
    for closure in closures.values():
        for _ in range(3):
            closure()
    times: dict[str, list[float]] = {name: [] for name in closures}
    for _ in range(rounds):
        for name in random.sample(sorted(closures), len(closures)):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(inner):
                closures[name]()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end) / inner)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="", help="benchmarks/results/lora.jsonl, lora_pieces.jsonl")
    parser.add_argument("--dry", action="store_true", help="tiny shapes, on the CPU")
    parser.add_argument("--pieces", action="store_true", help="what an augmented linear is made of, piece by piece: half a minute")
    parser.add_argument("--quick", action="store_true", help="four linears, nothing compiled: half a minute")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    device, tokens = ("cpu", 64) if options.dry else ("cuda", options.tokens)
    out = rows.Writer(options.out or rows.RESULTS / ("lora_pieces.jsonl" if options.pieces else "lora.jsonl"))
    if options.pieces:
        from benchmarks import lora_pieces

        lora_pieces.main(out, tokens, options.rank, device)
        return
    for width, outputs in ((64, (64, 32)), (64, (128,))) if options.dry else QUICK if options.quick else GROUPS:
        d = Data.draw(tokens, width, outputs, options.rank, device)
        pairs = {"base": base(d), "peft": peft(d), "addmm_": added(d, False), "thin_first": added(d, True),
                 "thin_kernels": added(d, True, kernels=True), "augmented": augmented(d, False),
                 "copied": augmented(d, True)}  # fmt: skip
        if not options.quick:
            pairs["fxfuse"] = compiled(d)
        forward = timed({name: pair[0] for name, pair in pairs.items()}, device)
        backward = timed({name: pair[1] for name, pair in pairs.items()}, device)
        both = {name: forward[name] + backward[name] for name in pairs}
        for name in pairs:
            out.write(op="lora", shape=f"{tokens}x{width}x{'+'.join(map(str, outputs))}", rank=options.rank, contender=name,
                      forward_ms=round(forward[name], 4), both_ms=round(both[name], 4),
                      forward_over_base=round(forward[name] / max(forward["base"], 1e-9) - 1, 4),
                      both_over_base=round(both[name] / max(both["base"], 1e-9) - 1, 4))  # fmt: skip


if __name__ == "__main__":
    main()
