"""Is there an algorithm of cuBLASLt that beats the one torch gets, once the chip is at its power limit?

    python benchmarks/lt_algorithms.py [--workloads W2b,W3] [--out FILE] [--window 0.3] [--rounds 3] [--most 64]

torch asks cuBLAS for a product and takes what its heuristic names first. cuBLASLt names eight, and each has knobs (tile, cluster,
order of tiles). Every one that the library accepts is timed briefly; the fastest few, and `torch` itself, then in turns over
windows long enough to be limited by power. Results are compared with torch's. Rows as in layouts.py; `algorithm`: its knobs in order.

What came of it (docs/matmuls.md): bursts up to 18% shorter, windows up to 16%, training steps 0 to 0.7%. So fxfuse takes what torch
gets. The committed rows are of this script before it was put in order, when it also went through the knobs CUSTOM and STAGES and
through numbers of tiles that no capability names (which the library may answer with a division by zero).
"""

from __future__ import annotations

import argparse
import ctypes
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks import rows  # noqa: E402
from benchmarks.layouts import Call, Meter, cases, window  # noqa: E402

BF16, FP32, COMPUTE_32F = 14, 0, 68
TRANSA, TRANSB = 3, 4
IDENTIFIER, TILE, SPLIT, REDUCTION, SWIZZLE, CUSTOM, STAGES, INNER, CLUSTER = range(9)  # knobs
TILES = 6  # a capability: which there are
WORKSPACE = 32 << 20
SEARCH = 6.0  # seconds for a product's candidates


class Algorithm(ctypes.Structure):
    _fields_ = [("data", ctypes.c_uint64 * 8)]


class Found(ctypes.Structure):
    _fields_ = [("algo", Algorithm), ("workspace", ctypes.c_size_t), ("status", ctypes.c_int), ("waves", ctypes.c_float),
                ("reserved", ctypes.c_int * 4)]  # fmt: skip


def check(status: int, what: str) -> None:
    if status:
        raise RuntimeError(f"{what}: cuBLAS status {status}")


@dataclass
class Matmul:
    """out = left @ right by cuBLASLt, row major; the transposed problem, column major, is what the library sees."""

    left: Tensor
    right: Tensor
    out: Tensor

    def __post_init__(self) -> None:
        self.lt = ctypes.CDLL(f"libcublasLt.so.{(torch.version.cuda or '13').split('.')[0]}")
        self.handle, self.desc = ctypes.c_void_p(), ctypes.c_void_p()
        check(self.lt.cublasLtCreate(ctypes.byref(self.handle)), "create")
        check(self.lt.cublasLtMatmulDescCreate(ctypes.byref(self.desc), COMPUTE_32F, FP32), "descriptor")
        self.a, self.b, self.c = (self.layout(t) for t in (self.right, self.left, self.out))
        for attribute, operand in ((TRANSA, self.right), (TRANSB, self.left)):
            value = ctypes.c_int32(0 if operand.stride(1) == 1 else 1)
            check(self.lt.cublasLtMatmulDescSetAttribute(self.desc, attribute, ctypes.byref(value), ctypes.c_size_t(4)), "transpose")
        self.workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=self.out.device)
        self.one, self.zero = ctypes.c_float(1), ctypes.c_float(0)

    def layout(self, of: Tensor) -> ctypes.c_void_p:
        """Row major [r, c] is column major [c, r]; a transposed view is what it is a view of, and transposed there."""
        base = of if of.stride(1) == 1 else of.t()
        found = ctypes.c_void_p()
        check(self.lt.cublasLtMatrixLayoutCreate(ctypes.byref(found), BF16, ctypes.c_uint64(base.shape[1]),
              ctypes.c_uint64(base.shape[0]), ctypes.c_int64(base.stride(0))), "layout")  # fmt: skip
        return found

    def heuristics(self, most: int) -> list[Algorithm]:
        preference, count = ctypes.c_void_p(), ctypes.c_int()
        check(self.lt.cublasLtMatmulPreferenceCreate(ctypes.byref(preference)), "preference")
        size = ctypes.c_uint64(WORKSPACE)
        check(self.lt.cublasLtMatmulPreferenceSetAttribute(preference, 1, ctypes.byref(size), ctypes.c_size_t(8)), "workspace")
        results = (Found * most)()
        check(self.lt.cublasLtMatmulAlgoGetHeuristic(self.handle, self.desc, self.a, self.b, self.c, self.c, preference, most,
              results, ctypes.byref(count)), "heuristic")  # fmt: skip
        return [copied(result.algo) for result in results[: count.value] if result.status == 0]

    def config(self, algo: Algorithm) -> tuple[int, ...]:
        """The knobs' values, in their order."""
        values, read = [], self.lt.cublasLtMatmulAlgoConfigGetAttribute
        for attribute in range(CLUSTER + 1):
            value, size = ctypes.c_uint32(0), ctypes.c_size_t(2 if attribute in (INNER, CLUSTER) else 4)
            read(ctypes.byref(algo), attribute, ctypes.byref(value), size, None)
            values.append(value.value)
        return tuple(values)

    def tiles(self, algo: Algorithm) -> list[int]:
        """Those that the library has for an algorithm. (It divides by the size of others.)"""
        found, written = (ctypes.c_uint32 * 4096)(), ctypes.c_size_t()
        size = ctypes.c_size_t(ctypes.sizeof(found))
        self.lt.cublasLtMatmulAlgoCapGetAttribute(ctypes.byref(algo), TILES, found, size, ctypes.byref(written))
        return [tile for tile in found[: written.value // 4] if tile]

    def with_attribute(self, algo: Algorithm, attribute: int, value: int) -> Algorithm | None:
        changed, held = copied(algo), ctypes.c_uint32(value)
        size = 2 if attribute in (INNER, CLUSTER) else 4
        if self.lt.cublasLtMatmulAlgoConfigSetAttribute(ctypes.byref(changed), attribute, ctypes.byref(held), ctypes.c_size_t(size)):
            return None
        result = Found()
        layouts = (self.a, self.b, self.c, self.c)
        if self.lt.cublasLtMatmulAlgoCheck(self.handle, self.desc, *layouts, ctypes.byref(changed), ctypes.byref(result)):
            return None
        return changed if result.workspace <= WORKSPACE else None

    def run(self, algo: Algorithm) -> int:
        byref, pointer = ctypes.byref, ctypes.c_void_p
        a, b, c = (pointer(t.data_ptr()) for t in (self.right, self.left, self.out))
        return self.lt.cublasLtMatmul(self.handle, self.desc, byref(self.one), a, self.a, b, self.b, byref(self.zero), c, self.c,
                                      c, self.c, byref(algo), pointer(self.workspace.data_ptr()), ctypes.c_size_t(WORKSPACE),
                                      pointer(torch.cuda.current_stream().cuda_stream))  # fmt: skip


def copied(algo: Algorithm) -> Algorithm:
    return Algorithm.from_buffer_copy(bytes(algo))


def burst(call: Call, count: int = 8) -> float:
    """Milliseconds of one of a few calls."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / count


def candidates(matmul: Matmul, expected: Tensor, most: int) -> Iterator[tuple[str, Algorithm, float]]:
    """Algorithms that run and agree with torch, briefly timed: the heuristic's, then the best of these with other knobs."""
    seen: dict[tuple[int, ...], float] = {}
    algos: dict[tuple[int, ...], Algorithm] = {}

    until = time.monotonic() + SEARCH

    def attempt(algo: Algorithm) -> None:
        key = matmul.config(algo)
        if key in seen or time.monotonic() > until:
            return
        matmul.out.fill_(float("nan"))
        seen[key] = float("inf")
        if matmul.run(algo):
            return
        torch.cuda.synchronize()
        if not (matmul.out.float() - expected.float()).norm() <= 1e-2 * expected.float().norm():
            sys.stdout.write(f"  {key} disagrees\n")
            return
        algos[key], seen[key] = algo, burst(lambda: matmul.run(algo))

    for algo in matmul.heuristics(most):
        attempt(algo)
    sys.stdout.write(f"  heuristics: {len(algos)} distinct\n")
    for turn in range(2):
        for key in sorted(algos, key=lambda key: seen[key])[:4]:
            tiles = () if turn else matmul.tiles(algos[key])
            for attribute, values in ((CLUSTER, range(2, 12)), (SWIZZLE, range(9)), (TILE, tiles)):
                for value in values:
                    changed = matmul.with_attribute(algos[key], attribute, value)
                    if changed is not None:
                        attempt(changed)
    for key in sorted(algos, key=lambda key: seen[key]):
        yield "-".join(map(str, key)), algos[key], seen[key]


def operands(kind: str, t: int, k: int, n: int) -> tuple[Tensor, Tensor]:
    draw = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    x, dy, w = draw(t, k), draw(t, n), draw(n, k) * k**-0.5
    return {"forward": (x, w.t()), "dgrad": (dy, w), "wgrad": (dy.t(), x)}[kind]


def compared(matmul: Matmul, most: int, finalists: int, window_s: float, rounds: int, meter: Meter) -> dict[str, dict[str, float]]:
    """By algorithm, torch first: milliseconds in windows and in a burst, joules, and the clock."""
    plain = partial(torch.mm, matmul.left, matmul.right, out=matmul.out)
    window(plain, 0.3, meter)
    best = [*candidates(matmul, plain().clone(), most)]
    calls = {"torch": plain} | {label: partial(matmul.run, algo) for label, algo, _ in best[:finalists]}
    bursts = {"torch": burst(plain)} | {label: ms for label, _, ms in best}
    windows: dict[str, list[tuple[float, float, int]]] = {label: [] for label in calls}
    for _ in range(rounds):
        for label in random.sample([*calls], len(calls)):
            windows[label].append(window(calls[label], window_s, meter))
    found = {}
    for label, measured in windows.items():
        ms, joule, mhz = (statistics.median(column) for column in zip(*measured, strict=True))
        found[label] = {"ms": round(ms, 4), "burst_ms": round(bursts[label], 4), "joule": round(joule, 4), "mhz": mhz}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default="W2b,W3")
    parser.add_argument("--out", default=str(rows.RESULTS / "lt_algorithms.jsonl"))
    parser.add_argument("--window", type=float, default=0.3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--most", type=int, default=64)
    parser.add_argument("--finalists", type=int, default=4)
    args = parser.parse_args()
    writer, meter = rows.Writer(args.out), Meter()
    for product, kind, name in cases(args.workloads.split(","), thin=True):
        left, right = operands(kind, product.rows, product.inner, product.outer)
        matmul = Matmul(left, right, left.new_empty(left.shape[0], right.shape[1]))
        shape = f"{product.rows}x{product.inner}x{product.outer}"
        sys.stdout.write(f"{name} {product.name} {shape} {kind}\n")
        for label, found in compared(matmul, args.most, args.finalists, args.window, args.rounds, meter).items():
            writer.write(op="lt_algorithms", workload=name, product=product.name, shape=shape, kind=kind, algorithm=label,
                         tflop_s=round(product.tflop / found["ms"] * 1e3), **found)
            sys.stdout.write(f"  {label:40s} {found}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
