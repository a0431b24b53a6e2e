"""Wide products in each way that the library can be asked for them: what a chip keeps up, and the energy it takes.

    python benchmarks/layouts.py [--workloads W2b,W3] [--ways plain,halves] [--out FILE] [--window 0.15] [--rounds 3]

A chip at its power limit runs as fast as its work is frugal, so each way runs for a window long enough to be limited,
in turns (another order each round), on a chip that is warm. `ms`: the median window's milliseconds a product; `joule`: of
one product, from NVML's counter, which ticks too seldom for windows under half a second; `mhz`: at the window's end.

    plain     as the arranged graphs call it                    lt       the same, cuBLASLt preferred
    turned    the weight copied into the other layout first     halves   rows in two halves
    added     plain, added to what is there (beta = 1)          room     a contraction longer by a room of 32, rows of 64 more
    columns   the result's columns in two halves                quarters rows in four quarters
"""

from __future__ import annotations

import argparse
import ctypes
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks import rows  # noqa: E402
from benchmarks.floor import Product, products  # noqa: E402
from benchmarks.workloads import WORKLOADS  # noqa: E402

Call = Callable[[], object]
ROOM, PITCH = 32, 64


class Meter:
    """Joules and clock of the current device, from NVML; zeros where it does not say."""

    def __init__(self) -> None:
        self.nvml, self.handle = None, ctypes.c_void_p()
        try:
            nvml = ctypes.CDLL("libnvidia-ml.so.1")
            uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}".encode()
            if nvml.nvmlInit_v2() == 0 and nvml.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(self.handle)) == 0:
                self.nvml = nvml
        except (OSError, AttributeError, RuntimeError, AssertionError) as error:
            sys.stderr.write(f"no energy: {error}\n")

    def joules(self) -> float:
        read = ctypes.c_ulonglong()
        if self.nvml is not None:
            self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle, ctypes.byref(read))
        return read.value / 1e3

    def mhz(self) -> int:
        read = ctypes.c_uint()
        if self.nvml is not None:
            self.nvml.nvmlDeviceGetClockInfo(self.handle, 1, ctypes.byref(read))
        return read.value


@contextmanager
def preferring(library: str) -> Iterator[None]:
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(library)
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


def lt(call: Call) -> Call:
    def run() -> object:
        with preferring("cublaslt"):
            return call()

    return run if torch.cuda.is_available() else call


def in_parts(left: Tensor, right: Tensor, out: Tensor, count: int) -> None:
    for some, result in zip(left.chunk(count), out.chunk(count), strict=True):
        torch.mm(some, right, out=result)


def in_columns(left: Tensor, right: Tensor, out: Tensor) -> None:
    for some, result in zip(right.chunk(2, 1), out.chunk(2, 1), strict=True):
        torch.mm(left, some, out=result)


def ways(product: Product, kind: str, device: str) -> dict[str, Call]:
    """The ways of one product: y = x w' (x [T, K], w [N, K]), dx = dy w, or dw = dy' x."""
    t, k, n = product.rows, product.inner, product.outer

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16) * std

    x, dy, w = draw(t, k), draw(t, n), draw(n, k, std=k**-0.5)
    if kind == "wgrad":
        dw = torch.empty_like(w)
        plain: Call = lambda: torch.mm(dy.t(), x, out=dw)  # noqa: E731
        return {"plain": plain, "lt": lt(plain), "turned": lambda: torch.mm(dy.t().contiguous(), x, out=dw),
                "added": lambda: dw.addmm_(dy.t(), x)}  # fmt: skip
    left, right = (x, w.t()) if kind == "forward" else (dy, w)
    out = draw(t, right.shape[1])
    inner, outer = right.shape
    wide = draw(t, inner + PITCH)[:, : inner + ROOM]
    if kind == "forward":
        roomy = draw(outer, inner + PITCH, std=k**-0.5)[:, : inner + ROOM].t()
    else:
        roomy = draw(inner + ROOM, outer, std=k**-0.5)
    other = (lambda: right.contiguous()) if kind == "forward" else (lambda: right.t().contiguous().t())
    plain = lambda: torch.mm(left, right, out=out)  # noqa: E731
    return {
        "plain": plain,
        "lt": lt(plain),
        "turned": lambda: torch.mm(left, other(), out=out),
        "halves": lambda: in_parts(left, right, out, 2),
        "quarters": lambda: in_parts(left, right, out, 4),
        "columns": lambda: in_columns(left, right, out),
        "added": lambda: out.addmm_(left, right),
        "room": lambda: torch.mm(wide, roomy, out=out),
    }


def residual_ways(product: Product, device: str) -> dict[str, Call]:
    """r + x w', r kept: added afterwards, or by an addmm that is not in place."""
    x = torch.randn(product.rows, product.inner, device=device, dtype=torch.bfloat16)
    w = torch.randn(product.outer, product.inner, device=device, dtype=torch.bfloat16) * product.inner**-0.5
    r = torch.randn(product.rows, product.outer, device=device, dtype=torch.bfloat16)
    return {"plain": lambda: r + torch.mm(x, w.t()), "addmm": lambda: torch.addmm(r, x, w.t())}


def window(call: Call, seconds: float, meter: Meter) -> tuple[float, float, int]:
    """Milliseconds and joules of one call, over a window; the clock at its end."""
    if not torch.cuda.is_available():
        call()
        return 0.0, 0.0, 0
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    count = max(1, int(seconds * 1e3 / start.elapsed_time(end)))
    before = meter.joules()
    start.record()
    for _ in range(count):
        call()
    end.record()
    mhz = 0
    while not end.query():
        mhz = meter.mhz()
    return start.elapsed_time(end) / count, (meter.joules() - before) / count, mhz


def cases(names: list[str], thin: bool = False) -> Iterator[tuple[Product, str, str]]:
    """Each product of some workloads once, with what it is and a workload that has it; ``thin``: those of keys and values too."""
    seen = set()
    for name in names:
        workload = WORKLOADS[name]
        for product in products(workload):
            if product.experts or (product.name == "k, v" and not thin):
                continue
            for kind in ("forward", "dgrad", *(["wgrad"] if workload.mode == "full" else [])):
                key = (product.rows, product.inner, product.outer, kind)
                if key not in seen:
                    seen.add(key)
                    yield product, kind, name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default="W2b,W3")
    parser.add_argument("--ways", default="", help="some of them, all without")
    parser.add_argument("--out", default=str(rows.RESULTS / "layouts.jsonl"))
    parser.add_argument("--window", type=float, default=0.15, help="seconds of each way at a time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="toy sizes, for a CPU")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    writer, meter = rows.Writer(args.out), Meter()
    random.seed(0)
    found = [*cases(args.workloads.split(","))]
    forward = [] if args.ways else [(p, name) for p, kind, name in found if kind == "forward" and p.name in ("q", "down")]
    residual = [(product, "residual", name) for product, name in forward]
    heat = ways(Product("", 64, 32, 48) if args.tiny else Product("", 8192, 4096, 4096), "forward", device)["plain"]
    window(heat, 20 * args.window, meter)
    for product, kind, name in (*found, *residual):
        one = Product(product.name, 64, 32, 48) if args.tiny else product
        calls = residual_ways(one, device) if kind == "residual" else ways(one, kind, device)
        if args.ways:
            calls = {way: call for way, call in calls.items() if way in args.ways.split(",")}
        measured: dict[str, list[tuple[float, float, int]]] = {way: [] for way in calls}
        for _ in range(args.rounds):
            for way in random.sample([*calls], len(calls)):
                measured[way].append(window(calls[way], args.window, meter))
        line = []
        for way, windows in measured.items():
            ms, joule, mhz = (statistics.median(column) for column in zip(*windows, strict=True))
            writer.write(op="layouts", workload=name, product=one.name, shape=f"{one.rows}x{one.inner}x{one.outer}", kind=kind, way=way,
                         ms=round(ms, 4), joule=round(joule, 4), mhz=mhz, tflop_s=round(one.tflop / ms * 1e3) if ms else 0)
            line.append(f"{way} {ms * 1e3:.0f} us {joule * 1e3:.0f} mJ {mhz}")
        sys.stdout.write(f"{name} {one.name} {one.rows}x{one.inner}x{one.outer} {kind}: {' | '.join(line)}\n")
        sys.stdout.flush()
        del calls
        if device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
