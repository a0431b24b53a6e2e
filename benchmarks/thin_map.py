"""A gate's backward and the thin products of its results (`kernels/thin_map.py`): in one pass, in every configuration, against apart.

    python benchmarks/thin_map.py [--out FILE] [--tokens 8192] [--width 14336] [--rank 16]

`error`: the largest distance of a result from that of the products apart, over its size (bfloat16 rounds to 0.004).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not benchmarks/: this folder's names are also packages

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks import rows  # noqa: E402

GATE = """program rank=2 math=float32
axis c0 = WIDTH
arg a0 : bfloat16[r,r|c0]
arg a1 : bfloat16[r,r|c0]
"""
FORWARD = GATE + """%0 = load a0 c0 0 1
%1 = sigmoid %0
%2 = mul %0 %1
%3 = load a1 c0 0 1
%4 = mul %2 %3
out y0 : bfloat16[r,r|c0] = %4 @ c0 0 1
"""
BACKWARD = GATE + """arg g_y0 : bfloat16[r,r|c0]
%0 = load a0 c0 0 1
%1 = sigmoid %0
%2 = mul %0 %1
%3 = load a1 c0 0 1
%4 = mul %2 %3
%5 = load g_y0 c0 0 1
%6 = mul %5 %3
%7 = mul %5 %2
%8 = mul %6 %1
%9 = mul %6 %0
%10 = const 1.0
%11 = sub %10 %1
%12 = mul %1 %11
%13 = mul %9 %12
%14 = add %8 %13
out y0 : bfloat16[r,r|c0] = %4 @ c0 0 1
out d_a0 : bfloat16[r,r|c0] = %14 @ c0 0 1
out d_a1 : bfloat16[r,r|c0] = %7 @ c0 0 1
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(rows.RESULTS / "thin_map.jsonl"))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=14336)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    out = rows.Writer(options.out)
    cases = [Case(name, options) for name in ("backward", "forward, terms alone", "forward, terms", "backward, term")]
    with ThreadPoolExecutor(16, thread_name_prefix="fxfuse-compile") as pool:  # by that name compiled in processes
        list(pool.map(lambda pair: pair[0].load(pair[1]), [(case, config) for case in cases for config in case.launches]))
    for case in cases:
        case.measure(out)


class Case:
    """One program and what is beside it, on tensors of its own."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        from fxfuse.kernels.thin_map import BOTH, CONFIGS, TERMS, Config, ThinMap, sizes_of
        from fxfuse.kernels.thin_map_sites import Down, Given, Site, _Place
        from fxfuse.kernels.thin_map_source import Beside, Thin

        rank, width, device = options.rank, options.width, options.device

        def drawn(a: int, b: int) -> Tensor:
            return torch.randn(a, b, device=device, dtype=torch.bfloat16)

        backward = name.startswith("backward")
        text = (BACKWARD if backward else FORWARD).replace("WIDTH", str(width))
        terms = {"backward, term": ("g_y0",), "forward, terms": ("a0", "a1"), "forward, terms alone": ("a0", "a1")}.get(name, ())
        across = ("d_a0", "d_a1") if backward else () if name.endswith("alone") else ("y0",)
        down = ("y0", "d_a0", "d_a1") if backward else ()
        beside = Beside(tuple(Thin(n, rank, 1.0) for n in terms), ("d_a0", "d_a1") if backward else ("y0",),
                        tuple(Thin(n, rank, 2.0) for n in across), tuple(Thin(n, rank, 1.0) for n in down))  # fmt: skip
        site = Site(text, beside, tuple((0, rank * i) for i in range(len(across))), (rank * len(across),) if across else (),
                    tuple(Down(True, n == "y0", None if n == "y0" else down.index(n) - 1) for n in down))  # fmt: skip
        place = _Place(site)
        ins = [drawn(options.tokens, width)[None] for _ in range(3 if backward else 2)]
        added = [t for _ in terms for t in (drawn(options.tokens, rank), drawn(rank, width))]
        given = Given(ins, added, [drawn(width, rank) for _ in across],
                      [drawn(options.tokens, rank) for _ in down], [None] if across else [])  # fmt: skip
        to = place.allocated(given, [None] * len(place.stored))
        whole = to._replace(outs=[torch.empty_like(ins[0]) if o is None else o for o in to.outs])
        operands = place.operands(given, to)
        sizes = sizes_of(text, beside, operands)
        assert sizes is not None
        results = [*operands.stored, *operands.results]
        self.name, self.shape, self.rank = name, f"{options.tokens}x{width}", rank
        self.operands, self.results, self.one = operands, results, ins[0]
        self.apart = lambda: place.apart(given, whole)
        configs = [*dict.fromkeys((*CONFIGS, *TERMS, *BOTH)), Config(stages=2, waves=2)]
        self.launches = {config: ThinMap(sizes, config, ins[0].device) for config in configs}
        self.failed: dict[Any, str] = {}

    def load(self, config: Any) -> None:
        try:
            self.launches[config].load(*self.operands.tensors)
        except Exception as error:
            self.failed[config] = f"{type(error).__name__}: {error}"[:300]

    def measure(self, out: rows.Writer) -> None:
        self.apart()
        truth = [r.clone() for r in self.results]
        closures: dict[str, Callable[[], object]] = {"apart": self.apart}
        errors: dict[str, float] = {}
        for config, launch in self.launches.items():
            if config in self.failed:
                out.write(op="thin_map", case=self.name, contender=str(config), failed=self.failed[config])
                continue
            launch(*self.operands.tensors)
            errors[str(config)] = max(float((a.double() - b.double()).norm() / b.double().norm())
                                      for a, b in zip(self.results, truth, strict=True))  # fmt: skip
            closures[str(config)] = lambda launch=launch: launch(*self.operands.tensors)
        target = self.one.clone()
        closures["copy"] = lambda: target.copy_(self.one)
        times = [0.0] * len(closures)
        if self.one.is_cuda:
            from fxfuse.kernels.tuning import times_on_device

            times = times_on_device(list(closures.values()))
        for contender, ms in zip(closures, times, strict=True):
            out.write(op="thin_map", case=self.name, shape=self.shape, rank=self.rank, contender=contender, ms=round(ms, 4),
                      error=errors.get(contender))  # fmt: skip


if __name__ == "__main__":
    main()
