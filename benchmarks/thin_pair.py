"""Two thin products of one large matrix, ``dY B`` and ``dY' h``: the library's two matmuls against one reading, in every configuration.

    python benchmarks/thin_pair.py [--out FILE] [--dry] [--tokens 8192]

``share_of_copy``: one reading of the matrix at the speed at which this device copies, over the time taken. ``error``: the larger
ratio of the two results, their distance from float64 over that of the library's. ``outer``: ``h B'``, which a sum begins with, beside
``fill``, which writes as much; ``outer with base``: ``r + h B'``, in place of ``outer`` and of ``sum`` behind the wide product.
``wide``, ``wide, added``: the product of 4096 columns that follows, alone and added to what is there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not benchmarks/: this folder's names are also packages

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks import rows  # noqa: E402
from benchmarks.lora import timed  # noqa: E402

# (rows, columns, warps, stages, waves) that are not among those that the library times
MORE = (
    (64, 256, 4, 3, 4), (64, 256, 4, 4, 1), (64, 256, 8, 3, 2), (64, 512, 8, 2, 1), (64, 512, 8, 3, 1), (32, 512, 4, 3, 2),
    (32, 256, 4, 6, 2), (128, 128, 4, 3, 2), (128, 128, 8, 4, 4), (64, 128, 4, 6, 2), (64, 128, 4, 3, 4), (128, 64, 4, 4, 4),
    (32, 256, 8, 3, 2), (32, 256, 8, 3, 4), (32, 256, 8, 4, 3), (16, 256, 8, 3, 4), (16, 256, 8, 4, 4), (16, 256, 4, 4, 4),
    (32, 512, 8, 3, 1), (32, 512, 8, 4, 2), (16, 512, 8, 4, 2), (32, 128, 4, 4, 4), (32, 128, 8, 3, 8), (32, 256, 4, 3, 4),
)  # fmt: skip
# (rows, columns, warps) of an outer product, likewise
MORE_OUTER = ((64, 256, 4), (128, 128, 4), (128, 64, 4), (16, 512, 4), (32, 512, 8), (64, 64, 2), (16, 256, 4))
WIDTHS, RANKS = (1024, 3584, 4096, 14336, 18944), (16, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(rows.RESULTS / "thin_pair.jsonl"))
    parser.add_argument("--dry", action="store_true", help="one tiny shape, on the CPU, the library alone")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--quick", action="store_true", help="two widths, one rank")
    parser.add_argument("--more", action="store_true", help="more configurations than the library times")
    options = parser.parse_args()
    out = rows.Writer(options.out)
    device, tokens = ("cpu", 64) if options.dry else ("cuda", options.tokens)
    for width in (64,) if options.dry else (4096, 14336) if options.quick else WIDTHS:
        for rank in (8,) if options.dry else RANKS[:1] if options.quick else RANKS:
            measure(tokens, width, rank, device, out, MORE if options.more and rank == RANKS[0] else ())


def measure(tokens: int, width: int, rank: int, device: str, out: rows.Writer, more: Sequence[tuple[int, ...]]) -> None:
    from fxfuse.kernels import thin_outer
    from fxfuse.kernels.thin_pair import CONFIGS, Config, ThinPair, sizes_of
    from fxfuse.products.calls import one_product, two_products

    def drawn(a: int, b: int) -> Tensor:
        return torch.randn(a, b, device=device, dtype=torch.bfloat16)

    matrix, right, left = drawn(tokens, width), drawn(width, rank), drawn(tokens, rank)
    results = [drawn(tokens, rank), drawn(width, rank)]
    target = torch.empty_like(matrix)
    closures = {"copy": lambda: target.copy_(matrix), "library": lambda: two_products(matrix, right, left, *results, 2.0, 2.0)}
    closures["library"]()
    exact = [2.0 * matrix.double() @ right.double(), 2.0 * matrix.double().t() @ left.double()]
    theirs, errors = [result.clone() for result in results], {}
    sizes = sizes_of(matrix, right, left, results[0])
    for config in () if device == "cpu" or sizes is None else (*CONFIGS, *(Config(*numbers) for numbers in more)):
        launch = ThinPair(sizes, config, matrix.device, 2.0, 2.0)
        launch(matrix, right, left, *results)
        errors[str(config)] = max(distance(a, t) / distance(b, t) for a, b, t in zip(results, theirs, exact, strict=True))
        closures[str(config)] = lambda launch=launch: launch(matrix, right, left, *results)
    x, weight = drawn(tokens, min(width, 4096)), drawn(width, min(width, 4096))
    closures |= {"wide": lambda: torch.mm(x, weight.t(), out=target), "wide, added": lambda: target.addmm_(x, weight.t(), beta=0.5)}
    closures |= {"outer": lambda: one_product(left, right.t(), target, 2.0), "fill": lambda: target.zero_()}
    base = drawn(tokens, width)
    closures |= {"sum": lambda: torch.add(base, target), "outer with base": lambda: one_product(left, right.t(), target, 2.0, base)}
    for name, summed in (("outer", None), ("outer with base", base)):
        sizes = thin_outer.sizes_of(left, right.t(), summed, target)
        truth = 2.0 * left.double() @ right.double().t() + (0.0 if summed is None else summed.double())
        closures[name]()
        theirs = [target.clone()]
        shapes = (*thin_outer.CONFIGS, *(thin_outer.Config(*numbers) for numbers in (MORE_OUTER if more else ())))
        for shape in () if device == "cpu" or sizes is None else shapes:
            launch = thin_outer.ThinOuter(sizes, shape, matrix.device, 2.0)
            outer = partial(launch, left, right.t(), target if summed is None else summed)
            outer(target)
            errors[f"{name} {shape}"] = distance(target, truth) / distance(theirs[0], truth)
            closures[f"{name} {shape}"] = partial(outer, target)
    times = timed(closures, device, inner=20)
    for name, ms in times.items():
        out.write(op="thin_pair", shape=f"{tokens}x{width}", rank=rank, contender=name, ms=round(ms, 4), error=errors.get(name),
                  share_of_copy=round(times["copy"] / 2 / max(ms, 1e-9), 3))  # fmt: skip


def distance(a: Tensor, truth: Tensor) -> float:
    return float((a.double() - truth).norm())


if __name__ == "__main__":
    main()
