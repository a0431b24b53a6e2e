"""What kernels.py times: each rule as the plain PyTorch function a model would run, with its binding shapes.

`fn` is the function; `make` draws one set of inputs; `forward_bytes` and `both_bytes` are the least traffic:
every input read once, every output written once, forward's residuals counted only where they are not an input
or output of the site anyway. The letters in the comments are tensors of the site's size (N elements of 2 bytes).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

EPS = 1e-5
SOFTCAP = 30.0
Fn = Callable[..., object]


@dataclass
class Inputs:
    """Arguments of `fn`, which of them are trained, and the cotangents of its outputs (None: a scalar loss)."""

    args: list[torch.Tensor]
    wrt: list[int]
    cotangents: list[torch.Tensor] | None


@dataclass(frozen=True)
class Case:
    op: str
    shape: str
    fn: Fn = field(repr=False)
    make: Callable[..., Inputs] = field(repr=False)
    forward_bytes: int
    both_bytes: int
    weight: str = ""  # "trained" or "frozen" where the site has a weight
    binding: bool = True
    goal: float | None = (
        None  # share of copy bandwidth the issue asks of fxfuse, forward+backward and forward
    )

    graph: bool = True  # timed as CUDA graph replays; a case long enough for launches not to count is timed without

    @property
    def name(self) -> str:
        return "/".join(part for part in (self.op, self.shape, self.weight) if part)


# --- the functions, as models spell them ---------------------------------------------------------------------


def rms_norm(x, w):
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return w * h.to(x.dtype)


def layer_norm(x, w, b):
    return F.layer_norm(x, (x.shape[-1],), w, b, EPS)


def residual_norm(x, r, w):
    s = r + x
    return rms_norm(s, w), s


def gated_norm(x, gate, w):
    return (rms_norm(x, w) * F.silu(gate.to(torch.float32))).to(x.dtype)


def l2_norm(x):
    h = x.to(torch.float32)
    return (h * torch.rsqrt(h.pow(2).sum(-1, keepdim=True) + EPS)).to(x.dtype)


def softmax(x):
    return F.softmax(x, dim=-1, dtype=torch.float32).to(x.dtype)


def rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def _rotate(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
    # Viewed back, so that cotangents arrive as they lie in memory. A captured graph with transposed outputs at its
    # edge (which no block has) makes AOTAutograd copy them, here as under Inductor.
    return q.transpose(1, 2), k.transpose(1, 2)


def rope(q, k, cos, sin):
    """q [B, S, H, d], k [B, S, G, d] as the projections leave them; rotated as [B, H, S, d] views, and viewed back."""
    return _rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin)


def qk_norm_rope(q, k, wq, wk, cos, sin):
    return _rotate(rms_norm(q, wq).transpose(1, 2), rms_norm(k, wk).transpose(1, 2), cos, sin)


def silu_gate(gate, up):
    return F.silu(gate) * up


def gelu_tanh_gate(gate, up):
    return F.gelu(gate, approximate="tanh") * up


def packed_silu_gate(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return up * F.silu(gate)


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


def gelu(x):
    return F.gelu(x)


def sigmoid(x):
    return torch.sigmoid(x)


def relu2(x):
    return torch.square(F.relu(x))


def softcap(x):
    return torch.tanh(x / SOFTCAP) * SOFTCAP


def cross_entropy(logits, labels):
    return F.cross_entropy(logits.to(torch.float32), labels, ignore_index=-100)


# --- inputs --------------------------------------------------------------------------------------------------


def _draw(*shape: int, device: str, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device=device) * scale).to(torch.bfloat16)


def _weight(n: int, device: str) -> torch.Tensor:
    return (1 + 0.1 * torch.randn(n, device=device)).to(torch.bfloat16)


def _rows(
    full: int, columns: int, outputs: int, rows: int, cols: int, trained: bool
) -> Callable[..., Inputs]:
    """`full` inputs [1, rows, cols], then `columns` weights [cols]; `outputs` cotangents."""

    def make(device: str) -> Inputs:
        args = [_draw(1, rows, cols, device=device) for _ in range(full)] + [
            _weight(cols, device) for _ in range(columns)
        ]
        wrt = list(range(full + (columns if trained else 0)))
        return Inputs(args, wrt, [_draw(1, rows, cols, device=device) for _ in range(outputs)])

    return make


def _packed(rows: int, cols: int) -> Callable[..., Inputs]:
    def make(device: str) -> Inputs:
        return Inputs([_draw(1, rows, 2 * cols, device=device)], [0], [_draw(1, rows, cols, device=device)])

    return make


def _heads(b: int, s: int, hq: int, hk: int, d: int, weights: bool, trained: bool) -> Callable[..., Inputs]:
    def make(device: str) -> Inputs:
        angle = torch.rand(1, s, d // 2, device=device) * 2 * math.pi
        angle = torch.cat([angle, angle], -1)
        tables = [angle.cos().to(torch.bfloat16), angle.sin().to(torch.bfloat16)]
        q, k = _draw(b, s, hq, d, device=device), _draw(b, s, hk, d, device=device)
        scales = [_weight(d, device), _weight(d, device)] if weights else []
        cotangents = [_draw(b, s, h, d, device=device) for h in (hq, hk)]
        return Inputs([q, k, *scales, *tables], [0, 1, *([2, 3] if trained else [])], cotangents)

    return make


def _logits(rows: int, vocab: int) -> Callable[..., Inputs]:
    def make(device: str) -> Inputs:
        labels = torch.randint(0, vocab, (rows,), device=device)
        labels[::17] = -100
        return Inputs([_draw(rows, vocab, device=device, scale=2.0), labels], [0], None)

    return make


# --- the list ------------------------------------------------------------------------------------------------


def _row_case(
    op: str,
    fn: Fn,
    rows: int,
    cols: int,
    full: int,
    columns: int,
    outputs: int,
    fwd: int,
    both: int,
    trained: bool | None = None,
    **more: Any,
) -> Case:
    size = 2 * rows * cols
    weight = "" if trained is None else "trained" if trained else "frozen"
    make = _rows(full, columns, outputs, rows, cols, bool(trained))
    return Case(op, f"{rows}x{cols}", fn, make, fwd * size, both * size, weight, **more)


def norm_cases(rows: int, cols: int, **more: Any) -> list[Case]:
    cases = []
    for trained in (True, False):
        cases += [
            _row_case(
                "rms_norm", rms_norm, rows, cols, 1, 1, 1, 2, 5, trained, goal=0.85, **more
            ),  # x y | x gy gx
            _row_case("layer_norm", layer_norm, rows, cols, 1, 2, 1, 2, 5, trained, goal=0.85, **more),
            _row_case(
                "residual_norm", residual_norm, rows, cols, 2, 1, 2, 4, 8, trained, goal=0.85, **more
            ),  # x r s y | s gs gy gx
            _row_case(
                "gated_norm", gated_norm, rows, cols, 2, 1, 1, 3, 8, trained, **more
            ),  # x z y | x z gy gx gz
        ]
    cases += [
        _row_case("l2_norm", l2_norm, rows, cols, 1, 0, 1, 2, 5, **more),
        _row_case("softmax", softmax, rows, cols, 1, 0, 1, 2, 5, **more),  # x y | y gy gx
    ]
    return cases


def gate_cases(rows: int, cols: int) -> list[Case]:
    size = 2 * rows * cols
    two: dict[str, Any] = dict(full=2, columns=0, outputs=1, fwd=3, both=8, goal=0.85)  # g u y | g u gy gg gu
    return [
        _row_case("gated_activation[silu]", silu_gate, rows, cols, **two),
        _row_case("gated_activation[gelu_tanh]", gelu_tanh_gate, rows, cols, **two),
        Case(
            "gated_activation[silu, packed]",
            f"{rows}x{cols}",
            packed_silu_gate,
            _packed(rows, cols),
            3 * size,
            8 * size,
            goal=0.85,
        ),
        _row_case("activation[gelu_tanh]", gelu_tanh, rows, cols, 1, 0, 1, 2, 5),  # x y | x gy gx
        _row_case("activation[gelu]", gelu, rows, cols, 1, 0, 1, 2, 5),
        _row_case("activation[sigmoid]", sigmoid, rows, cols, 1, 0, 1, 2, 5),  # x y | y gy gx
        _row_case("activation[relu2]", relu2, rows, cols, 1, 0, 1, 2, 5),
        _row_case("activation[softcap]", softcap, rows, cols, 1, 0, 1, 2, 5, binding=False),
    ]


def rope_cases(b: int, s: int, hq: int, hk: int, d: int) -> list[Case]:
    size = 2 * b * s * (hq + hk) * d
    shape = f"b{b} s{s} h{hq}/{hk} d{d}"
    cases = [Case("rope", shape, rope, _heads(b, s, hq, hk, d, False, False), 2 * size, 4 * size, goal=0.85)]
    for trained in (True, False):
        make = _heads(b, s, hq, hk, d, True, trained)
        cases.append(
            Case(
                "qk_norm_rope",
                shape,
                qk_norm_rope,
                make,
                2 * size,
                5 * size,
                "trained" if trained else "frozen",
            )
        )
    return cases


def loss_cases(rows: int, vocab: int) -> list[Case]:
    size = 2 * rows * vocab  # z | z gz: two reads and a write
    return [
        Case(
            "cross_entropy",
            f"{rows}x{vocab}",
            cross_entropy,
            _logits(rows, vocab),
            size,
            3 * size,
            graph=False,
            goal=1 / 1.3,
        )
    ]


def binding_cases(dry: bool = False) -> list[Case]:
    """The binding shapes of DESIGN section 11; with `dry`, the same list at sizes a CPU can run."""
    if dry:
        return [*norm_cases(8, 64), *gate_cases(8, 64), *rope_cases(1, 8, 4, 2, 16), *loss_cases(8, 128)]
    norms = [case for cols in (4096, 2048, 8192) for case in norm_cases(8192, cols)]
    return [*norms, *gate_cases(8192, 14336), *rope_cases(2, 4096, 32, 8, 128), *loss_cases(8192, 128256)]


SWEEP_COLUMNS = (1024, 2048, 4096, 5120, 8192, 12288, 16384)
SWEEP_ROWS = (512, 2048, 8192, 32768)


def sweep_cases(dry: bool = False, quick: bool = False) -> list[Case]:
    columns: tuple[int, ...] = (48, 64) if dry else SWEEP_COLUMNS
    rows: tuple[int, ...] = (4, 8) if dry else SWEEP_ROWS
    if quick and not dry:
        columns, rows = (1024, 4096, 5120, 16384), (512, 32768)
    wanted = ("rms_norm", "residual_norm", "layer_norm", "softmax")
    return [
        case
        for cols in columns
        for n in rows
        for case in norm_cases(n, cols, binding=False)
        if case.op in wanted and case.weight != "frozen"
    ]
