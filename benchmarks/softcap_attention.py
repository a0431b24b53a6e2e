"""Softcap attention at Gemma-2-2B's shape: which library kernel, or which composition of them, is the fastest.

    python benchmarks/softcap_attention.py [--seconds 540] [--only flex,rows] [--out FILE] [--dry]
    python benchmarks/softcap_attention.py --switch [--seconds 90]       # fxfuse's steps from chunks to what it then chooses

b2, 8 query heads on 4 key/value heads, s4096, d256, causal, cap 50, bf16. Contenders, forward and forward+backward:

    sdpa          without the cap: the bound, not a contender
    eager         the formula as models write it, compiled by Inductor
    rows <c>      the formula over c query rows at a time: library GEMMs over the keys that the rows may see, and one
                  elementwise kernel between them; scores live for one chunk only, the backward makes them again
    fxfuse        the formula under the rule ``attention``, which runs it as "rows" does, with derived kernels
    flex <...>    FlexAttention with a table of kernel options, forward and backward apart; tanh or its exponential form

Every variant runs under a time limit of its own, and its output and gradients are compared with float32. One JSON
object a row; a killed run keeps what it measured.
"""

from __future__ import annotations

import argparse
import itertools
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # noqa: E402

from benchmarks import rows, timing  # noqa: E402

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
CAP = 50.0

# Forward: BLOCK_M, BLOCK_N, warps, stages. Backward: BLOCK_M1, BLOCK_N1, BLOCK_M2, BLOCK_N2, warps, stages.
FORWARD = [(128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (128, 32, 8, 3), (128, 128, 8, 1), (64, 64, 8, 2), (64, 128, 8, 2)]
BACKWARD = [
    (64, 64, 64, 64, 8, 2), (64, 64, 64, 64, 8, 1), (32, 64, 64, 32, 8, 2), (32, 64, 64, 32, 4, 2), (64, 64, 64, 64, 8, 3),
    (32, 128, 128, 32, 8, 2), (64, 128, 128, 64, 8, 1), (32, 64, 64, 32, 8, 3), (128, 64, 64, 128, 8, 1), (16, 128, 128, 16, 8, 2),
]  # fmt: skip


class Shape:
    """Sizes and inputs: q [b,h,s,d], k and v [b,kv,s,d] as transposes of [b,s,heads,d], which is how models make them."""

    def __init__(self, dry: bool) -> None:
        self.b, self.h, self.kv, self.s, self.d = (1, 4, 2, 64, 16) if dry else (2, 8, 4, 4096, 256)
        self.device = "cpu" if dry else "cuda"
        self.name = f"b{self.b} h{self.h}/{self.kv} s{self.s} d{self.d} cap"
        self.causal_flops = 4 * self.b * self.h * self.s * self.s * self.d / 2

    def tensor(self, heads: int, grad: bool = True) -> Tensor:
        made = torch.randn(self.b, self.s, heads, self.d, device=self.device, dtype=torch.bfloat16) * 2
        return made.transpose(1, 2).requires_grad_(grad)


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    return torch.tanh(torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5 / CAP) * CAP


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As models write it: repeated keys, an additive mask, softmax in float32."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    mask = torch.full((q.shape[2], q.shape[2]), float("-inf"), device=q.device, dtype=q.dtype).triu(1)
    return torch.matmul(F.softmax(scores_of(q, k) + mask, -1, dtype=torch.float32).to(q.dtype), v)


# --- chunks of query rows ------------------------------------------------------------------------------------


def weights_of(s: Tensor, start: Tensor, c: int, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax of capped, causally masked products. s: [n, g*c, e] -> the same in bf16, log of the sum [n, g*c, 1]."""
    capped = masked(s, start, c, scale)
    top = capped.amax(-1, keepdim=True)
    e = torch.exp(capped - top)
    total = e.sum(-1, keepdim=True)
    return (e / total).to(s.dtype), top + torch.log(total)


def masked(s: Tensor, start: Tensor, c: int, scale: float) -> Tensor:
    capped = torch.tanh(s.float() * (scale / CAP)) * CAP
    row = torch.arange(s.shape[1], device=s.device) % c + start
    return torch.where(torch.arange(s.shape[2], device=s.device) <= row[:, None], capped, float("-inf"))


def products_gradient(
    s: Tensor, dp: Tensor, lse: Tensor, delta: Tensor, start: Tensor, c: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The weights again, and the gradient of the products."""
    capped = masked(s, start, c, scale)
    p = torch.exp(capped - lse)
    slope = 1 - (capped.masked_fill(capped == float("-inf"), 0) / CAP) ** 2
    return p.to(s.dtype), (p * (dp.float() - delta) * slope * scale).to(s.dtype)


class Rows(torch.autograd.Function):
    """The arithmetic of a chunked composition, written by hand for this measurement only."""

    forward_kernel: Callable = staticmethod(weights_of)
    backward_kernel: Callable = staticmethod(products_gradient)

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, c: int, starts: Tensor) -> Tensor:  # type: ignore[override]
        b, h, s, d = q.shape
        n, g = b * k.shape[1], h // k.shape[1]
        k3, v3 = k.reshape(n, s, d), v.reshape(n, s, d)
        out = torch.empty(b, s, h, d, device=q.device, dtype=q.dtype).transpose(1, 2)
        lses = []
        for i, start in enumerate(range(0, s, c)):
            qc = q[:, :, start : start + c].reshape(n, g * c, d)
            p, lse = Rows.forward_kernel(torch.bmm(qc, k3[:, : start + c].transpose(1, 2)), starts[i], c, d**-0.5)
            out[:, :, start : start + c] = torch.bmm(p, v3[:, : start + c]).view(b, h, c, d)
            lses.append(lse)
        ctx.save_for_backward(q, k3, v3, out, starts, *lses)
        ctx.c = c
        return out

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple:  # type: ignore[override]
        q, k3, v3, out, starts, *lses = ctx.saved_tensors
        (b, h, s, d), c = q.shape, ctx.c
        n = k3.shape[0]
        g = b * h // n
        dq = torch.empty_like(q)
        delta = (do.float() * out.float()).sum(-1, keepdim=True)
        dk, dv = torch.zeros_like(k3), torch.zeros_like(v3)
        for i, start in reversed(list(enumerate(range(0, s, c)))):
            rows_ = slice(start, start + c)
            qc, gc = q[:, :, rows_].reshape(n, g * c, d), do[:, :, rows_].reshape(n, g * c, d)
            keys, values = k3[:, : start + c], v3[:, : start + c]
            products, dp = torch.bmm(qc, keys.transpose(1, 2)), torch.bmm(gc, values.transpose(1, 2))
            dc = delta[:, :, rows_].reshape(n, g * c, 1)
            p, ds = Rows.backward_kernel(products, dp, lses[i], dc, starts[i], c, d**-0.5)
            dq[:, :, rows_] = torch.bmm(ds, keys).view(b, h, c, d)
            dv[:, : start + c].baddbmm_(p.transpose(1, 2), gc)
            dk[:, : start + c].baddbmm_(ds.transpose(1, 2), qc)
        shape = (b, h // g, s, d)
        return dq, dk.view(shape), dv.view(shape), None, None


def rows_contender(c: int, shape: Shape) -> Attention:
    starts = torch.arange(0, shape.s, c, device=shape.device)
    return lambda q, k, v: Rows.apply(q, k, v, c, starts)


def ours(shape: Shape) -> Attention:
    """The formula with a mask that comes from outside, as blocks get it, compiled by fxfuse."""
    from fxfuse.backend import Backend

    mask = torch.full((shape.s, shape.s), torch.finfo(torch.bfloat16).min, device=shape.device, dtype=torch.bfloat16).triu(1)

    def written(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        repeat = lambda t: t[:, :, None].expand(-1, -1, groups, -1, -1).reshape(q.shape[0], -1, *t.shape[2:])  # noqa: E731
        weights = F.softmax(scores_of(q, repeat(k)) + mask, -1, dtype=torch.float32).to(q.dtype)
        return torch.matmul(weights, repeat(v))

    compiled = torch.compile(written, backend=Backend(strict=True, rules=("attention",)), dynamic=True, fullgraph=True)
    return lambda q, k, v: compiled(q, k, v, mask.expand(shape.b, 1, -1, -1))


# --- FlexAttention -------------------------------------------------------------------------------------------


def tanh_cap(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return CAP * torch.tanh(score / CAP)


def exp_cap(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """tanh(x) = 1 - 2 / (exp(2x) + 1)"""
    return CAP - 2 * CAP / (torch.exp(score * (2 / CAP)) + 1)


def mask_cap(mask: Tensor) -> Callable:
    """The cap, and an additive mask [b, 1, s, s] that is read where it is needed."""

    def modified(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return CAP * torch.tanh(score / CAP) + mask[b, 0, i, j]

    return modified


def options(forward: tuple | None, backward: tuple | None, **more: Any) -> dict[str, Any]:
    found = dict(more)
    if forward:
        found.update(zip(("fwd_BLOCK_M", "fwd_BLOCK_N", "fwd_num_warps", "fwd_num_stages"), forward, strict=True))
    if backward:
        names = ("bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2", "bwd_num_warps", "bwd_num_stages")
        found.update(zip(names, backward, strict=True))
    return found


def flex_contender(shape: Shape, score: Callable, kernel_options: dict[str, Any]) -> Attention:
    causal = create_block_mask(lambda b, h, i, j: i >= j, None, None, shape.s, shape.s, device=shape.device)
    flex = flex_attention if shape.device == "cpu" else torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: flex(
        q, k, v, score_mod=score, block_mask=causal, enable_gqa=True, kernel_options=kernel_options or None
    )


# --- measuring -----------------------------------------------------------------------------------------------


class TooLong(Exception):
    """A variant passed its time limit."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooLong(f"not done in {seconds:.0f} s")

    former = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def truth(shape: Shape, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> list[Tensor]:
    """Output and gradients in float32, head by head of the first batch entry's first key/value head."""
    groups = shape.h // shape.kv
    q1, k1, v1 = (t.detach()[:1, :m].float().requires_grad_() for t, m in ((q, groups), (k, 1), (v, 1)))
    out = eager(q1, k1, v1)
    return [out, *torch.autograd.grad(out, (q1, k1, v1), g[:1, :groups].float())]


def error_of(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    """Root mean square of the difference over that of the truth, for the output and each gradient."""
    errors = []
    for got, ref in zip(found, wanted, strict=True):
        part = got.detach()[: ref.shape[0], : ref.shape[1]].float()
        errors.append(((part - ref).norm() / ref.norm()).item())
    return [round(e, 5) for e in errors]


def bench(name: str, make: Callable[[], Attention], shape: Shape, out: rows.Writer, limit: float, **facts: Any) -> float:
    """Check and time one contender; forward+backward milliseconds, or infinity."""
    q, k, v = shape.tensor(shape.h), shape.tensor(shape.kv), shape.tensor(shape.kv)
    g = shape.tensor(shape.h, grad=False)
    row: dict[str, Any] = dict(kind="probe", op="softcap_attention", shape=shape.name, contender=name, **facts)
    try:
        with limited(limit):
            torch._dynamo.reset()
            begun = time.perf_counter()
            run = make()
            result = run(q, k, v)
            found = [result, *torch.autograd.grad(result, (q, k, v), g)]
            row["first_s"] = round(time.perf_counter() - begun, 1)
            row["error"] = error_of(found, truth(shape, q, k, v, g))
            del result, found
            forward = timing.measure([lambda: run(q, k, v)] * 4, reps=5, graph=False)
            both = timing.measure([lambda: torch.autograd.grad(run(q, k, v), (q, k, v), g)] * 4, reps=5, graph=False)
    except Exception as error:  # a variant that does not compile, or not in time, is a row that says so
        row["failed"] = f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:160] if str(error) else ''}"
        out.write(**row)
        sys.stdout.write(f"{name:44s} {row['failed']}\n")
        return float("inf")
    row.update(ms_forward=forward.ms, ms=both.ms, tflops_forward=shape.causal_flops / forward.ms / 1e9,
               tflops=3.5 * shape.causal_flops / both.ms / 1e9)  # fmt: skip
    out.write(**row)
    line = f"{name:44s} {forward.ms:7.3f} {both.ms:7.3f} ms  first {row['first_s']:5.1f} s  error {row['error']}\n"
    sys.stdout.write(line)
    sys.stdout.flush()
    return both.ms


def switch(shape: Shape, seconds: float) -> None:
    """Steps of 26 such layers, each checkpointed: their times, and the seconds at which the choice was made, for empty caches."""
    from torch.utils.checkpoint import checkpoint

    from fxfuse.attention import layouts

    run = ours(shape)
    q, k, v = shape.tensor(shape.h), shape.tensor(shape.kv), shape.tensor(shape.kv)
    arriving = shape.tensor(shape.h, grad=False)
    optimizer = torch.optim.SGD([q, k, v], lr=0.0)
    begun, last, after = time.perf_counter(), "", 0
    while time.perf_counter() - begun < seconds and after < 5:
        start = time.perf_counter()
        for _ in range(26):
            checkpoint(run, q, k, v, use_reentrant=False).backward(arriving)
        torch.cuda.synchronize()
        middle = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        stepped = time.perf_counter() - middle
        said = "; ".join(f"{layout.choice}: {layout.choice.words}" if layout.choice else f"beside {layouts._now.beside is not None}"
                         for layout in layouts._layouts.values())
        if said != last or stepped > 0.05 or after:
            times = f"step {1e3 * (middle - start):7.1f} ms  optimizer {1e3 * stepped:7.1f} ms"
            sys.stdout.write(f"{middle - begun:6.2f} s  {times}  {said}\n")
            sys.stdout.flush()
        last, after = said, after + all(layout.choice for layout in layouts._layouts.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=540, help="stop starting new variants after this long")
    parser.add_argument("--limit", type=float, default=60, help="seconds for one variant")
    parser.add_argument("--only", default="", help="names, or their beginnings, by comma")
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "softcap_attention.jsonl"))
    parser.add_argument("--dry", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--switch", action="store_true")
    args = parser.parse_args()
    shape, begun = Shape(args.dry), time.perf_counter()
    if args.switch:
        switch(shape, args.seconds)
        return
    out = rows.Writer(args.out)
    chosen = tuple(filter(None, args.only.split(",")))

    def run(name: str, make: Callable[[], Attention], **facts: Any) -> float:
        if (chosen and not name.startswith(chosen)) or time.perf_counter() - begun > args.seconds:
            return float("inf")
        return bench(name, make, shape, out, args.limit, **facts)

    compiled = (lambda f: f) if args.dry else (lambda f: torch.compile(f, dynamic=True))
    run("sdpa", lambda: lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    run("eager", lambda: eager if args.dry else torch.compile(eager))
    Rows.forward_kernel, Rows.backward_kernel = staticmethod(compiled(weights_of)), staticmethod(compiled(products_gradient))
    for c in (16,) if args.dry else (256, 512, 128, 1024):
        run(f"rows {c}", lambda c=c: rows_contender(c, shape), rows=c)
    run("fxfuse", lambda: ours(shape))
    if args.dry:
        return  # FlexAttention has no backward on a CPU

    def flex(forward: tuple | None, backward: tuple | None, score: Callable = tanh_cap, note: str = "", **more: Any) -> float:
        chosen_options = options(forward, backward, **more)
        text = " ".join(map(str, itertools.chain(forward or ("-",), ("|",), backward or ("-",))))
        make = lambda: flex_contender(shape, score, chosen_options)  # noqa: E731
        return run(f"flex{note} {text}", make, options=chosen_options)

    flex(None, None)
    best_backward = min(BACKWARD, key=lambda b: flex(FORWARD[0], b))
    best_forward = min(FORWARD, key=lambda f: flex(f, best_backward))
    flex(best_forward, best_backward, exp_cap, " exp")
    mask = torch.full((shape.s, shape.s), float("-inf"), device=shape.device, dtype=torch.bfloat16).triu(1)
    flex(best_forward, best_backward, mask_cap(mask.expand(shape.b, 1, -1, -1)), " mask tensor")
    flex(best_forward, best_backward, tanh_cap, " tma", USE_TMA=True)
    flex(best_forward, best_backward, tanh_cap, " safe rows", ROWS_GUARANTEED_SAFE=True, BLOCKS_ARE_CONTIGUOUS=True)


if __name__ == "__main__":
    main()
