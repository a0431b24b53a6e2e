"""A probe, not part of the library: could a gate's backward also add up what the adapter behind it needs of its output?

    python benchmarks/gate_probe.py > benchmarks/results/gate_probe.txt

The backward of ``h = silu(g) u`` writes h again, for dA = t' h alone (t [T, r]: the gradient of the down projection's low-rank term). A
kernel that walks down a block of columns could keep that sum in registers and not write h; with ``term`` it adds t A to the gradient
that arrives, too. Many shapes of tiles are timed, beside what runs today: the gate as one long row, and the library's product.
NVIDIA GPU; with TRITON_INTERPRET=1 one small shape runs on the CPU.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not benchmarks/: this folder's names are also packages

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton import testing  # noqa: E402

from fxfuse.kernels.thin_pair_kernel import product  # noqa: E402

SHAPES = (
    (16, 256),
    (16, 512),
    (16, 1024),
    (32, 128),
    (32, 256),
    (32, 512),
    (64, 64),
    (64, 128),
    (128, 64),
)  # rows, columns of a tile
WARPS, STAGES, WAVES = (4, 8, 16), (1, 2, 3, 4), (2, 4, 8)
SHOWN = 6
INTERPRETED = bool(triton.knobs.runtime.interpret)


@triton.jit
def gate(g, u, d):
    """The gate's output, and the gradients of g and u."""
    s = 1.0 / (1.0 + tl.exp(-g))
    x = g * s
    return x * u, d * u * (s + x * (1.0 - s)), d * x


@triton.jit
def long_row_kernel(p_g, p_u, p_d, p_h, n, B: tl.constexpr):
    """What runs today: everything as one long row, the gradients in the memory of g and u."""
    place = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = place < n
    g = tl.load(p_g + place, mask=inside).to(tl.float32)
    u = tl.load(p_u + place, mask=inside).to(tl.float32)
    d = tl.load(p_d + place, mask=inside).to(tl.float32)
    h, dg, du = gate(g, u, d)
    tl.store(p_h + place, h.to(tl.bfloat16), mask=inside)
    tl.store(p_g + place, dg.to(tl.bfloat16), mask=inside)
    tl.store(p_u + place, du.to(tl.bfloat16), mask=inside)


@triton.jit
def summing_kernel(p_g, p_u, p_d, p_t, p_a, p_sums, rows, columns, rows_each, R: tl.constexpr, ROWS: tl.constexpr,
                   COLUMNS: tl.constexpr, STAGES: tl.constexpr, TERM: tl.constexpr):  # fmt: skip
    """g, u, d [rows, columns], t [rows, R], a [R, columns]; parts of t' h in p_sums [splits, R, columns].

    Sizes are multiples of tiles.
    """
    blocks = tl.cdiv(columns, COLUMNS)
    block, split = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    column, rank = block * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, R)
    if TERM:
        a = tl.load(p_a + rank[:, None] * columns + column[None, :])
    total = tl.zeros((R, COLUMNS), tl.float32)
    first = split * rows_each
    for start in tl.range(first, tl.minimum(first + rows_each, rows), ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        place = row.to(tl.int64)[:, None] * columns + column[None, :]
        g, u = tl.load(p_g + place).to(tl.float32), tl.load(p_u + place).to(tl.float32)
        d, t = tl.load(p_d + place).to(tl.float32), tl.load(p_t + row[:, None] * R + rank[None, :])
        if TERM:
            d = product(t, a, d)
        h, dg, du = gate(g, u, d)
        tl.store(p_g + place, dg.to(tl.bfloat16))
        tl.store(p_u + place, du.to(tl.bfloat16))
        total = product(tl.trans(t), h.to(tl.bfloat16), total)
    tl.store(p_sums + split * columns * R + rank[:, None] * columns + column[None, :], total)


class Probe:
    """Operands of one size, timed in many shapes."""

    def __init__(self, rows: int, columns: int, rank: int) -> None:
        device = "cpu" if INTERPRETED else "cuda"
        drawn = [torch.randn(rows, columns, device=device).bfloat16() for _ in range(3)]
        self.kept, (self.g, self.u, self.d) = drawn, (each.clone() for each in drawn)
        self.t = torch.randn(rows, rank, device=device).bfloat16()
        self.a = torch.randn(rank, columns, device=device).bfloat16()
        self.units = 2 if INTERPRETED else torch.cuda.get_device_properties(0).multi_processor_count

    def today(self) -> tuple[float, float]:
        """Microseconds of the gate's backward, and of dA."""
        h, n, block = torch.empty_like(self.g), self.g.numel(), 2048
        own = timed(
            lambda: long_row_kernel[(triton.cdiv(n, block),)](
                self.g, self.u, self.d, h, n, block, num_warps=4
            )
        )
        return own, timed(lambda: self.t.t() @ h)

    def summing(
        self, shape: tuple[int, int], warps: int, stages: int, waves: int, term: bool
    ) -> float | None:
        """Microseconds in one shape; None where it does not fit the device."""
        (tile_rows, tile_columns), (rows, columns), rank = shape, self.g.shape, self.t.shape[1]
        if (
            rows % tile_rows
            or columns % tile_columns
            or not 8 <= tile_rows * tile_columns // (32 * warps) <= 64
        ):
            return None
        blocks = triton.cdiv(columns, tile_columns)
        each = triton.cdiv(triton.cdiv(rows, max(1, waves * self.units // blocks)), tile_rows) * tile_rows
        splits = triton.cdiv(rows, each)
        sums = torch.empty(splits, rank, columns, device=self.g.device)

        def launch() -> None:
            summing_kernel[(blocks * splits,)](self.g, self.u, self.d, self.t, self.a, sums, rows, columns, each, rank, tile_rows,
                                               tile_columns, stages, term, num_warps=warps)  # fmt: skip

        self.g.copy_(self.kept[0])
        self.u.copy_(self.kept[1])
        try:
            launch()
        except triton.runtime.errors.OutOfResources:
            return None
        self.check(sums.sum(0), term)
        return timed(launch)

    def check(self, found: torch.Tensor, term: bool) -> None:
        """The sums, and the gradient of u, of the first columns."""
        g, u, d = (each[:, :64].float() for each in self.kept)
        d = d + self.t.float() @ self.a[:, :64].float() if term else d
        silu = torch.nn.functional.silu(g)
        expected = self.t.float().t() @ (silu * u).bfloat16().float()
        torch.testing.assert_close(
            found[:, :64], expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())
        )
        torch.testing.assert_close(
            self.u[:, :64].float(), d * silu, rtol=2e-2, atol=2e-2 * float(d.abs().max())
        )


def timed(run: Callable[[], object]) -> float:
    """Microseconds, the median."""
    if INTERPRETED:
        run()
        return 0.0
    return 1e3 * testing.do_bench(run, warmup=20, rep=60, return_mode="median")  # type: ignore[no-any-return]


def main() -> None:
    torch.manual_seed(0)
    probe = Probe(128, 256, 16) if INTERPRETED else Probe(8192, 14336, 16)
    own, product_us = probe.today()
    sys.stdout.write(f"the gate's backward {own:.1f} us, dA by the library {product_us:.1f} us\n")
    tried = [*itertools.product(SHAPES, WARPS, STAGES, WAVES)][:: 37 if INTERPRETED else 1]
    for term in (False, True):
        found = {key: us for key in tried if (us := probe.summing(*key, term)) is not None}
        for key in sorted(found, key=found.__getitem__)[:SHOWN]:
            shape, warps, stages, waves = key
            sys.stdout.write(f"one kernel{', with the term' * term}: {found[key]:.1f} us  tile {shape}, {warps} warps, "
                             f"{stages} stages, {waves} waves\n")  # fmt: skip


if __name__ == "__main__":
    main()
