"""Rows held in segments against rows held in one block: norms and softmax of lengths that are no power of two, on this GPU.

    python -m benchmarks.tune_probe_segments [--cases "rms_norm bwd,softmax fwd"] [--jobs 14]
    TRITON_INTERPRET=1 python -m benchmarks.tune_probe_segments --dry      # a few rows on the CPU: the logic alone

One launch each, as `benchmarks/tune_probe.py` has them: what the rule of thumb takes, and configurations in segments; the share is of
a plain pass over as many bytes in the same run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from benchmarks import tune_probe
from benchmarks.tune_probe import Candidate, Case, configs, programs_of

NORMS = ("rms_norm", "layer_norm", "residual_norm")
# By columns: segments (columns of one, warps) that leave nothing or little empty, for backwards with sums over rows and for others.
WITH_SUMS = {
    12288: [(4096, 16)], 5120: [(1024, 4), (1024, 8), (2048, 8)], 3584: [(512, 4), (1024, 4)], 14336: [(2048, 16), (4096, 16)],
    16384: [(4096, 16), (8192, 16)],
}  # fmt: skip
WITHOUT = {
    12288: [(4096, 16), (4096, 8), (4096, 32)], 5120: [(1024, 4), (1024, 8)], 3584: [(512, 4), (512, 2)],
    14336: [(2048, 16), (2048, 8)], 16384: [(4096, 16)],
}  # fmt: skip
ALL_ROWS, FEWER = (2048, 8192, 32768), (8192,)
CAPTURED = 96


def with_sums(columns: int) -> list[Candidate]:
    """What waits for no reduction is summed first, with none, one or two rows loaded ahead; or the row is read twice."""
    found = []
    for block, warps in WITH_SUMS[columns]:
        units = 4 if warps < 16 else 1
        stages = (3, 2, 1) if block == WITH_SUMS[columns][0][0] else (3,)
        found += [(1, block, warps, s, units, False, "", True) for s in stages]
        if columns >= 12288:
            found.append((1, block, warps, 1, units, True))
    before = [*configs("rows", (1, 0, 16, 1, 1, True)), *configs("looped", (1, 4096, 16))] if columns > 8192 else []
    return [*before, *configs("rows", *found)]


def without(columns: int, op: str) -> list[Candidate]:
    found = [(1, block, warps) for block, warps in WITHOUT[columns]]
    if columns >= 12288 and op != "softmax":
        found.append((1, WITHOUT[columns][0][0], WITHOUT[columns][0][1], 1, 1, True))
    return configs("rows", *found)


def widened(text: str, columns: int) -> str:
    """A program captured at the usual width, at another: it says its width in one place."""
    return re.sub(rf"^(axis \w+ = ){CAPTURED}$", rf"\g<1>{columns}", text, flags=re.MULTILINE)


def cases() -> Iterator[Case]:
    for columns in (12288, 5120, 3584, 14336, 16384):
        for op in (*NORMS, "softmax"):
            weight = "" if op == "softmax" else "trained"
            forward, *_, backward = [widened(text, columns) for text in programs_of(op, weight, CAPTURED)]
            for rows in ALL_ROWS if columns in (12288, 5120) else FEWER:
                tried = with_sums(columns) if weight else without(columns, op)
                yield Case(f"{op} bwd", backward, (1, rows), columns, [Candidate(None), *tried])
            if columns in (12288, 5120) and op in ("rms_norm", "layer_norm"):
                frozen = widened(programs_of(op, "frozen", CAPTURED)[-1], columns)
                yield Case(f"{op} frozen bwd", frozen, (1, 8192), columns, [Candidate(None), *without(columns, op)])
            if columns < 16384:
                yield Case(f"{op} fwd", forward, (1, 8192), columns, [Candidate(None), *without(columns, op)])


if __name__ == "__main__":
    tune_probe.main("benchmarks.tune_probe_segments", cases)
