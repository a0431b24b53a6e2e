"""A training step's products and attention, sustained, if they were called otherwise: which change would a whole step feel?

    python benchmarks/alternatives.py [--workloads W2b,W3] [--rounds 4] [--out FILE]

All products and attentions of a step stand one after the other, as in floor.py, with gradients of one input accumulated in one
buffer. Ways of calling them take turns, so that each sees the chip as the power limit leaves it.

    plain      each linear by itself, attention as torch picks it
    packed     q, k, v and gate, up with their weights one below the other: one product forward, one or two backward
    packed_qkv, packed_mlp   only these
    flash      torch's own flash attention in place of cuDNN's
    flash4     flash-attn-4, where it is installed
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from benchmarks import rows  # noqa: E402
from benchmarks.workloads import WORKLOADS, Workload  # noqa: E402

Closure = Callable[[], object]
WAYS = ("plain", "packed", "packed_qkv", "packed_mlp", "flash", "flash4")


def drawn(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16) * scale


class Group:
    """Linears [N_i, K] of one input [T, K]."""

    def __init__(self, tokens: int, inner: int, outer: tuple[int, ...], packed: bool, trained: bool) -> None:
        self.x, self.dy = drawn(tokens, inner), drawn(tokens, sum(outer))
        self.weights = [drawn(n, inner, scale=inner**-0.5) for n in ((sum(outer),) if packed else outer)]
        self.dys = [self.dy] if packed else [drawn(tokens, n) for n in outer]
        self.trained = trained

    def forward(self) -> None:
        for weight in self.weights:
            self.x @ weight.t()

    def backward(self) -> None:
        dx = self.dys[0] @ self.weights[0]
        for dy, weight in zip(self.dys[1:], self.weights[1:], strict=True):
            dx.addmm_(dy, weight)
        if self.trained:
            for dy in self.dys:
                dy.t() @ self.x


def attention(w: Workload, way: str) -> tuple[Closure, Closure]:
    """Forward, and forward with backward; q, k, v [b, s, heads, width] as the projections leave them."""
    c = w.config
    width = c.get("head_dim", c["hidden_size"] // c["num_attention_heads"])
    q, k, v = (drawn(w.batch, w.length, n, width).requires_grad_()
               for n in (c["num_attention_heads"], c["num_key_value_heads"], c["num_key_value_heads"]))  # fmt: skip
    g = torch.randn_like(q)
    if way == "flash4":
        from flash_attn.cute import flash_attn_func

        def run() -> Tensor:
            found = flash_attn_func(q, k, v, causal=True)
            return found[0] if isinstance(found, tuple) else found
    else:
        def run() -> Tensor:
            by_head = (tensor.transpose(1, 2) for tensor in (q, k, v))
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if way == "flash" else nullcontext():
                return F.scaled_dot_product_attention(*by_head, is_causal=True, enable_gqa=True).transpose(1, 2)

    def forward() -> None:
        with torch.no_grad():
            run()

    def both() -> None:
        torch.autograd.grad(run(), [q, k, v], g)

    return forward, both


def step(w: Workload, way: str) -> Closure:
    """One training step's products and attentions."""
    c = w.config
    trained, hidden, inner = w.mode == "full", c["hidden_size"], c["intermediate_size"]
    head = c.get("head_dim", hidden // c["num_attention_heads"])
    q, kv = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
    group = partial(Group, w.tokens, trained=trained)
    groups = [group(hidden, (q, kv, kv), packed=way in ("packed", "packed_qkv")), group(q, (hidden,), packed=False),
              group(hidden, (inner, inner), packed=way in ("packed", "packed_mlp")), group(inner, (hidden,), packed=False)]  # fmt: skip
    ends = Group(w.tokens // 8, hidden, (c["vocab_size"],), packed=False, trained=trained)
    forward, both = attention(w, way)

    def run() -> None:
        for _ in range(c["num_hidden_layers"]):
            for each in groups:
                each.forward()
            if w.checkpointed:
                forward()
        for _ in range(8):
            ends.forward()
            ends.backward()
        for _ in range(c["num_hidden_layers"]):
            if w.checkpointed:
                for each in groups[:-1]:
                    each.forward()
            for each in reversed(groups):
                each.backward()
            both()

    return run


def burst_ms(run: Closure, calls: int = 20) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    run()
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default="W2b,W3")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", default=str(rows.RESULTS / "alternatives.jsonl"))
    args = parser.parse_args()
    writer = rows.Writer(args.out)
    for name in args.workloads.split(","):
        w, runs, failed = WORKLOADS[name], {}, {}
        for way in args.ways.split(","):
            try:
                runs[way] = step(w, way)
                forward, both = attention(w, way)
                ms = dict(forward_ms=round(burst_ms(forward), 4), both_ms=round(burst_ms(both), 4))
                writer.write(kind="attention", workload=name, way=way, **ms)
                runs[way]()
                torch.cuda.synchronize()
            except Exception as error:  # a library that is not there, or does not run on this chip
                runs.pop(way, None)
                failed[way] = f"{type(error).__name__}: {error}"[:300]
        times: dict[str, list[float]] = {way: [] for way in runs}
        for _ in range(args.rounds):
            for way, run in runs.items():
                times[way].append(burst_ms(run, 2))
        for way, found in times.items():
            ms, each = statistics.median(found), [round(ms, 1) for ms in found]
            writer.write(kind="sustained", workload=name, way=way, ms=round(ms, 2), all=each)
            sys.stdout.write(f"{name} {way}: {ms:.1f} ms {each}\n")
        for way, why in failed.items():
            sys.stdout.write(f"{name} {way}: {why}\n")
        del runs
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
