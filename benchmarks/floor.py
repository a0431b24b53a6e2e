"""The least time a training step could take: its matrix products and attention alone, at rates measured in this run.

    python benchmarks/floor.py --workloads W1,W2,W2b,W3,W4,W5 [--out FILE]

Each shape is timed by itself (`ms`: the sum over a step of each at its own best rate, short bursts) and then all of a
step's products and attentions one after the other (`sustained_ms`: what the chip keeps up); and these again with copies between
them that move as many bytes as the rest of a step has to (`with_traffic_ms`, traffic.py): what a step takes whose other
kernels run at the rate of a copy, without adapters' arithmetic and with no gap. Frozen weights have no weight gradient; a
checkpointed block is computed twice, although parts of it are needed by nobody.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from benchmarks import rows, timing  # noqa: E402
from benchmarks.traffic import traffic  # noqa: E402
from benchmarks.workloads import WORKLOADS, Workload  # noqa: E402


@dataclass(frozen=True)
class Product:
    """y[T, N] = x[T, K] w[N, K]', bf16; with `experts`, rows in that many equal groups, each with its own w."""

    name: str
    rows: int
    inner: int
    outer: int
    experts: int = 0

    @property
    def tflop(self) -> float:
        return 2 * self.rows * self.inner * self.outer / 1e12

    def closures(self, kind: str, device: str) -> list[timing.Closure]:
        """`forward` y, `dgrad` dx = dy w, `wgrad` dw = dy' x."""
        touched = 2 * (self.rows * (self.inner + self.outer) + max(1, self.experts) * self.inner * self.outer)
        return [self.closure(kind, device) for _ in range(timing.sets_for(touched, most=16))]

    def closure(self, kind: str, device: str) -> timing.Closure:
        x = torch.randn(self.rows, self.inner, device=device, dtype=torch.bfloat16)
        dy = torch.randn(self.rows, self.outer, device=device, dtype=torch.bfloat16)
        groups = (self.experts,) if self.experts else ()
        w = (
            torch.randn(*groups, self.outer, self.inner, device=device, dtype=torch.bfloat16)
            * self.inner**-0.5
        )
        if self.experts:
            each = self.rows // self.experts
            ends = torch.arange(each, self.rows + 1, each, device=device, dtype=torch.int32)
            if kind == "forward":
                return partial(_grouped, x, w.transpose(-2, -1), ends)
            return partial(_grouped, dy, w, ends)
        left, right = {"forward": (x, w.t()), "dgrad": (dy, w), "wgrad": (dy.t(), x)}[kind]
        return partial(torch.mm, left, right)


def _grouped(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    product = getattr(F, "grouped_mm", None) or torch._grouped_mm
    return product(x, w, offs=ends)


@dataclass(frozen=True)
class Attention:
    """Causal SDPA, the backend that torch picks."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    width: int

    name = "attention"

    @property
    def tflop(self) -> float:
        """Forward; half of the square."""
        return 2 * self.batch * self.heads * self.length**2 * self.width / 1e12

    def closures(self, kind: str, device: str) -> list[timing.Closure]:
        return [self.closure(kind, device) for _ in range(2)]

    def closure(self, kind: str, device: str) -> timing.Closure:
        """`forward`, or `both`: forward and the gradients of q, k and v."""

        def draw(heads: int) -> torch.Tensor:
            shape = (self.batch, self.length, heads, self.width)
            drawn = torch.randn(shape, device=device, dtype=torch.bfloat16).transpose(1, 2)
            return drawn.requires_grad_()

        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor) -> object:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return out if kind == "forward" else torch.autograd.grad(out, [q, k, v], g)

        q, k, v = draw(self.heads), draw(self.kv_heads), draw(self.kv_heads)
        return partial(run, q, k, v, torch.randn_like(q))


def products(w: Workload) -> dict[Product, int]:
    """The linears of one decoder layer, with their number."""
    c = w.config
    hidden, head = c["hidden_size"], c.get("head_dim", c["hidden_size"] // c["num_attention_heads"])
    q, kv, t = c["num_attention_heads"] * head, c["num_key_value_heads"] * head, w.tokens
    found = {
        Product("q", t, hidden, q): 1,
        Product("o", t, q, hidden): 1,
        Product("k, v", t, hidden, kv): 2,
    }
    if "num_experts" in c:
        chosen, experts, inner = t * c["num_experts_per_tok"], c["num_experts"], c["moe_intermediate_size"]
        return found | {
            Product("experts' gate and up", chosen, hidden, 2 * inner, experts): 1,
            Product("experts' down", chosen, inner, hidden, experts): 1,
        }
    inner = c["intermediate_size"]
    return found | {Product("gate, up", t, hidden, inner): 2, Product("down", t, inner, hidden): 1}


def attention_of(w: Workload) -> Attention:
    c = w.config
    width = c.get("head_dim", c["hidden_size"] // c["num_attention_heads"])
    return Attention(w.batch, w.length, c["num_attention_heads"], c["num_key_value_heads"], width)


class Rates:
    """Milliseconds of one product or attention; each shape is measured once."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.known: dict[tuple[Any, str], float] = {}

    def __call__(self, work: Product | Attention, kind: str) -> float:
        key = (work, kind)
        if key not in self.known:
            self.known[key] = timing.measure(work.closures(kind, self.device), reps=9).ms
            if self.device == "cuda":
                torch.cuda.empty_cache()
        return self.known[key]


def floor(w: Workload, rate: Callable[[Any, str], float]) -> dict[str, Any]:
    """Milliseconds by part, and TFLOP."""
    layers, full = w.config["num_hidden_layers"], w.mode == "full"
    linears, attention = products(w), attention_of(w)
    head = Product("head", w.tokens, w.config["hidden_size"], w.config["vocab_size"])

    def all_of(kind: str) -> float:
        return layers * sum(count * rate(product, kind) for product, count in linears.items())

    forward = all_of("forward")
    parts = dict(
        forward=forward,
        recompute=forward if w.checkpointed else 0.0,
        dgrad=all_of("dgrad"),
        wgrad=all_of("wgrad") if full else 0.0,
        head=sum(rate(head, kind) for kind in ("forward", "dgrad", *(["wgrad"] if full else []))),
        attention=layers
        * (rate(attention, "both") + (rate(attention, "forward") if w.checkpointed else 0.0)),
    )
    passes = 2 + full + w.checkpointed
    tflop = dict(
        linear=layers * passes * sum(n * p.tflop for p, n in linears.items()),
        head=(2 + full) * head.tflop,
        attention=layers * (3.5 + w.checkpointed) * attention.tflop,
    )
    down = next((p for p in linears if p.name == "down"), None)
    return dict(
        ms=round(sum(parts.values()), 1),
        parts={k: round(v, 1) for k, v in parts.items()},
        tflop={k: round(v, 1) for k, v in tflop.items()},
        needless_recompute_ms=round(layers * rate(down, "forward"), 1) if down and w.checkpointed else 0.0,
    )


class Copies:
    """Copies that move a number of bytes, between places of two buffers that change from one to the next, beyond any cache."""

    def __init__(self, device: str) -> None:
        size = 2**30 if device == "cuda" else 2**20
        self.source, self.target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
        self.start = 0

    def __call__(self, moved: int) -> list[timing.Closure]:
        """As many as it takes."""
        found: list[timing.Closure] = []
        left = moved // 2  # what is copied is read and written
        while left > 0:
            count = min(left, self.source.numel() - self.start)
            place = slice(self.start, self.start + count)
            found.append(partial(self.target[place].copy_, self.source[place]))
            self.start = (self.start + count) % self.source.numel()
            left -= count
        return found


def between(work: list[timing.Closure], moved: int, copies: Copies) -> list[timing.Closure]:
    """``work`` with an equal part of the bytes behind each of it."""
    return [closure for each in work for closure in (each, *copies(moved // len(work)))]


def sustained_ms(w: Workload, device: str, copies: Copies | None = None) -> float:
    """All products and attentions of a step one after the other, three steps long; milliseconds a step.

    With ``copies`` the rest of the step's bytes is moved between them.
    """
    linears, attention = products(w), attention_of(w)
    head = Product("head", w.tokens, w.config["hidden_size"], w.config["vocab_size"])
    gradients = ["dgrad", "wgrad"] if w.mode == "full" else ["dgrad"]
    forward = [c for p, n in linears.items() for c in [p.closure("forward", device)] * n]
    backward = [c for p, n in linears.items() for kind in gradients for c in [p.closure(kind, device)] * n]
    # attention's forward and backward come as one: a block that is not checkpointed needs no other forward of it
    first = [*forward, attention.closure("forward", device)] if w.checkpointed else forward
    again = forward if w.checkpointed else []
    second = [*again, *backward, attention.closure("both", device)]
    ends = [head.closure(kind, device) for kind in ("forward", *gradients)]
    if copies is not None:
        moved = traffic(w)
        first = between(first, moved.forward, copies)
        second = between(second, moved.backward + (moved.forward if w.checkpointed else 0), copies)
        ends = between(ends, moved.once, copies)
    layers = w.config["num_hidden_layers"]
    step = first * layers + ends + second * layers

    def run() -> None:
        for closure in step:
            closure()

    return timing.measure([run], reps=3, graph=False).ms


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--tiny", action="store_true", help="toy widths, for a CPU")
    parser.add_argument("--out", default=str(rows.RESULTS / "steps.jsonl"))
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    writer, rate = rows.Writer(args.out), Rates(device)
    for name in args.workloads.split(","):
        workload = WORKLOADS[name]
        if args.tiny:
            workload = replace(workload, tiny=True, layers=2, length=64)
        found = floor(workload, rate)
        moved, layers = traffic(workload), workload.config["num_hidden_layers"]
        found["traffic_gb"] = round(
            (layers * (moved.forward * (1 + workload.checkpointed) + moved.backward) + moved.once) / 1e9, 1
        )
        found["sustained_ms"] = round(sustained_ms(workload, device), 1)
        found["with_traffic_ms"] = round(sustained_ms(workload, device, Copies(device)), 1)
        shapes = {
            f"{p.name} {p.rows}x{p.inner}x{p.outer} {kind}": round(p.tflop / rate.known[p, kind] * 1e3)
            for p in products(workload)
            for kind in ("forward", "dgrad", "wgrad")
            if (p, kind) in rate.known
        }
        writer.write(kind="floor", workload=name, contender="floor", repeat=0, **found, tflop_s=shapes)
        sys.stdout.write(
            f"{name}: floor {found['ms']} ms, sustained {found['sustained_ms']} ms, with {found['traffic_gb']} GB moved between "
            f"{found['with_traffic_ms']} ms, {found['parts']}\n"
        )
        if device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
