"""Two thin products of one large matrix, ``dY B`` and ``dY' h``: the library's two matmuls against one reading, in every configuration.

    python benchmarks/thin_pair.py [--out FILE] [--dry] [--tokens 8192]

``share_of_copy``: one reading of the matrix at the speed at which this device copies, over the time taken. ``error``: the larger
ratio of the two results, their distance from float64 over that of the library's. ``outer``: ``h B'``, which a sum begins with, beside
``fill``, which writes as much.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not benchmarks/: this folder's names are also packages

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks import rows  # noqa: E402
from benchmarks.lora import timed  # noqa: E402

WIDTHS, RANKS = (1024, 3584, 4096, 14336, 18944), (16, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(rows.RESULTS / "thin_pair.jsonl"))
    parser.add_argument("--dry", action="store_true", help="one tiny shape, on the CPU, the library alone")
    parser.add_argument("--tokens", type=int, default=8192)
    options = parser.parse_args()
    out = rows.Writer(options.out)
    device, tokens = ("cpu", 64) if options.dry else ("cuda", options.tokens)
    for width in (64,) if options.dry else WIDTHS:
        for rank in (8,) if options.dry else RANKS:
            measure(tokens, width, rank, device, out)


def measure(tokens: int, width: int, rank: int, device: str, out: rows.Writer) -> None:
    from fxfuse.kernels.thin_choice import Operands, library
    from fxfuse.kernels.thin_pair import CONFIGS, ThinPair, sizes_of
    from fxfuse.products.calls import product

    def drawn(a: int, b: int) -> Tensor:
        return torch.randn(a, b, device=device, dtype=torch.bfloat16)

    o = Operands(drawn(tokens, width), drawn(width, rank), drawn(tokens, rank), drawn(tokens, rank), drawn(width, rank))
    target = torch.empty_like(o.matrix)
    closures = {"copy": lambda: target.copy_(o.matrix), "library": lambda: library(o, 2.0, 2.0)}
    library(o, 2.0, 2.0)
    exact = [2.0 * o.matrix.double() @ o.right.double(), 2.0 * o.matrix.double().t() @ o.left.double()]
    theirs, errors = [o.across.clone(), o.down.clone()], {}
    sizes = sizes_of(*o[:4])
    for config in () if device == "cpu" or sizes is None else CONFIGS:
        launch = ThinPair(sizes, config, o.matrix.device, 2.0, 2.0)
        launch(*o)
        errors[str(config)] = max(distance(a, t) / distance(b, t) for a, b, t in zip([o.across, o.down], theirs, exact, strict=True))
        closures[str(config)] = lambda launch=launch: launch(*o)
    closures |= {"outer": lambda: product(o.left, o.right.t(), 2.0), "fill": lambda: target.zero_()}
    times = timed(closures, device, inner=20)
    for name, ms in times.items():
        out.write(op="thin_pair", shape=f"{tokens}x{width}", rank=rank, contender=name, ms=round(ms, 4), error=errors.get(name),
                  share_of_copy=round(times["copy"] / 2 / max(ms, 1e-9), 3))  # fmt: skip


def distance(a: Tensor, truth: Tensor) -> float:
    return float((a.double() - truth).norm())


if __name__ == "__main__":
    main()
