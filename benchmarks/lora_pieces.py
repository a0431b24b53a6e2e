"""What an augmented linear is made of, piece by piece (``python benchmarks/lora.py --pieces``): where the time over its base goes.

Forward: h = x A' [T, R] into columns beside x, s B [N, R] beside W, [x, h] [W, s B]' over K + R. Backward: g = s dY B beside dY, A
under W, [dY, g] [W; A], dA = g' x, dB = dY' (s h). Rows of x, dY and W lie ``K + R`` or ``K + 64`` apart (the latter whole lines of
128 bytes); the wide product is over the first K + R columns or over all K + 64, the last of which are zeros. Milliseconds, in turns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import rows
from benchmarks.lora import SCALE, Closure, scaled, timed

SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096))


def _into(out: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0) -> Tensor:
    return torch.mm(left, right, out=out) if alpha == 1.0 else torch.addmm(out, left, right, beta=0, alpha=alpha, out=out)


def _roomy(rows_: int, columns: int, room: int, device: str) -> Tensor:
    matrix = torch.randn(rows_, columns + room, device=device, dtype=torch.bfloat16) * 0.02
    matrix[:, columns:] = 0
    return matrix


def forward(tokens: int, width: int, outputs: int, rank: int, device: str) -> dict[str, Closure]:
    """By name: a piece, or a whole forward of pieces."""
    a, b = _roomy(rank, width, 0, device), _roomy(outputs, rank, 0, device)
    found: dict[str, Closure] = {}
    x, w = _roomy(tokens, width, 0, device), _roomy(outputs, width, 0, device)
    found["base"] = lambda: x @ w.t()
    found["h"] = lambda: x @ a.t()
    for room in (rank, 64):
        found |= _forward_in_room(tokens, a, b, room, device)
    y = x.new_empty(tokens, outputs)
    h = x @ a.t()
    found["thin first: s h B'"] = lambda: _into(y, h, b.t(), SCALE)
    found["thin first: y += x W'"] = lambda: y.addmm_(x, w.t())
    found["thin first"] = lambda: scaled(x @ a.t(), b.t(), SCALE).addmm_(x, w.t())
    return found


def _forward_in_room(tokens: int, a: Tensor, b: Tensor, room: int, device: str) -> dict[str, Closure]:
    (rank, width), outputs = a.shape, b.shape[0]
    x, w = _roomy(tokens, width, room, device), _roomy(outputs, width, room, device)
    inner, h, tail = x[:, :width], x[:, width:width + rank], w[:, width:width + rank]
    left, right = x[:, :width + rank], w[:, :width + rank].t()
    found: dict[str, Closure] = {
        "base, x apart": lambda: inner @ w[:, :width].t(),
        "h into the room": lambda: _into(h, inner, a.t()),
        "s h into the room": lambda: _into(h, inner, a.t(), SCALE),
        "tail: s B": lambda: torch.mul(b, SCALE, out=tail),
        "tail: copy": lambda: tail.copy_(b),
        "wide, K + R": lambda: left @ right,
        "whole": lambda: (_into(h, inner, a.t()), torch.mul(b, SCALE, out=tail), left @ right),
        "whole, s h and a copy": lambda: (_into(h, inner, a.t(), SCALE), tail.copy_(b), left @ right),
        "whole, the tail stays": lambda: (_into(h, inner, a.t()), left @ right),
    }
    if room > rank:
        found["wide, all columns"] = lambda: x @ w.t()
        found["whole, all columns, the tail stays"] = lambda: (_into(h, inner, a.t()), x @ w.t())
    return {f"{name} (room {room})": closure for name, closure in found.items()}


def backward(tokens: int, width: int, outputs: int, rank: int, device: str) -> dict[str, Closure]:
    a, b = _roomy(rank, width, 0, device), _roomy(outputs, rank, 0, device)
    dy, w, x = (_roomy(*sizes, 0, device) for sizes in ((tokens, outputs), (outputs, width), (tokens, width)))
    h, g, db = _roomy(tokens, rank, 0, device), _roomy(tokens, rank, 0, device), torch.empty_like(b)
    found: dict[str, Closure] = {
        "base": lambda: dy @ w,
        "s dY B": lambda: scaled(dy, b, SCALE),
        "dA = g' x": lambda: g.t() @ x,
        "dA' = x' g": lambda: x.t() @ g,
        "dB = s dY' h": lambda: _into(db, dy.t(), h, SCALE),
        "dB' = h' dY": lambda: h.t() @ dy,
        "thin first": lambda: (scaled(dy, b, SCALE), scaled(g, a, 1.0).addmm_(dy, w), g.t() @ x, _into(db, dy.t(), h, SCALE)),
    }
    for room in (rank, 64):
        found |= _backward_in_room(tokens, a, b, room, device)
    return found


def _backward_in_room(tokens: int, a: Tensor, b: Tensor, room: int, device: str) -> dict[str, Closure]:
    (rank, width), outputs = a.shape, b.shape[0]
    dy, x = _roomy(tokens, outputs, room, device), _roomy(tokens, width, room, device)
    below = _roomy(outputs + room, width, 0, device)
    inner, g, left = dy[:, :outputs], dy[:, outputs:outputs + rank], dy[:, :outputs + rank]
    h, tail, right, db = x[:, width:width + rank], below[outputs:outputs + rank], below[:outputs + rank], torch.empty_like(b)

    def thin() -> tuple[Tensor, Tensor, Tensor]:
        return _into(g, inner, b, SCALE), g.t() @ x[:, :width], _into(db, inner.t(), h, SCALE)

    found: dict[str, Closure] = {
        "base, dY apart": lambda: inner @ below[:outputs],
        "s dY B into the room": lambda: _into(g, inner, b, SCALE),
        "tail: A": lambda: tail.copy_(a),
        "wide, N + R": lambda: left @ right,
        "dA = g' x, apart": lambda: g.t() @ x[:, :width],
        "dB = s dY' h, apart": lambda: _into(db, inner.t(), h, SCALE),
        "whole": lambda: (thin(), tail.copy_(a), left @ right),
        "whole, the tail stays": lambda: (thin(), left @ right),
    }
    if room > rank:
        found["wide, all columns"] = lambda: dy @ below
    return {f"{name} (room {room})": closure for name, closure in found.items()}


def copies(rows_: int, columns: int, device: str) -> dict[str, Closure]:
    """Ways to give a matrix that has no room some: 64 columns, from a line to the next."""
    room = 64
    source, wide = _roomy(rows_, columns, 0, device), _roomy(rows_, columns, room, device)
    inner, free = wide[:, :columns], _roomy(rows_, room, 0, device)
    return {
        "clone, no room": source.clone,
        "room: copy_": lambda: inner.copy_(source),
        "room: cat": lambda: torch.cat((source, free), 1),
        "room: cat into": lambda: torch.cat((source, free), 1, out=wide),
        "room: copy_ of 8-byte numbers": lambda: inner.view(torch.int64).copy_(source.view(torch.int64)),
        "room: copy_ of 16-byte numbers": lambda: inner.view(torch.complex128).copy_(source.view(torch.complex128)),
    }


def main(out: rows.Writer, tokens: int, rank: int, device: str) -> None:
    """All pieces of each shape, one row each."""
    for sizes in ((64, 64),) if device == "cpu" else ((tokens, 4096), (tokens // 4, 4096), (14336, 4096), (4096, 14336)):
        for name, spent in timed(copies(*sizes, device), device, rounds=7, inner=10).items():
            out.write(op="lora_copies", shape="x".join(map(str, sizes)), contender=name, ms=round(spent, 4))
            print(f"{'x'.join(map(str, sizes))} {spent:8.4f} ms  {name}", flush=True)
    for width, outputs in ((64, 32),) if device == "cpu" else SHAPES:
        for direction, make in (("forward", forward), ("backward", backward)):
            for name, spent in timed(make(tokens, width, outputs, rank, device), device, rounds=7, inner=10).items():
                out.write(op="lora_pieces", shape=f"{tokens}x{width}x{outputs}", rank=rank, direction=direction, contender=name,
                          ms=round(spent, 4))  # fmt: skip
                print(f"{tokens}x{width}x{outputs} {direction:8} {spent:8.4f} ms  {name}", flush=True)
