"""Rows held in segments against rows held in one block: norms and softmax of lengths that are no power of two, on this GPU.

    python -m benchmarks.tune_probe_segments [--cases "rms_norm bwd,softmax fwd"] [--jobs 14]
    TRITON_INTERPRET=1 python -m benchmarks.tune_probe_segments --dry --cases "softmax fwd"    # a few rows on the CPU

One launch each, as `benchmarks/tune_probe.py` has them: the rule of thumb, all that tuning would try beside it, and a few more; the
share is of a plain pass over as many bytes in the same run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from benchmarks import tune_probe
from benchmarks.tune_probe import Candidate, Case, configs, programs_of

OPS = {"rms_norm": ("trained", "frozen"), "layer_norm": ("trained",), "residual_norm": ("trained",), "softmax": ("",)}
COLUMNS = (1536, 2560, 3072, 6144, 7168, 10240, 11008, 12288, 14336)
ROWS, CAPTURED = 8192, 96
# More ways to sum over short rows: two of them to a tile, or none ahead.
MORE = {1536: [(2, 512, 4, 3, 4, False, "", True), (1, 512, 4, 1, 4, False, "", True)],
        2560: [(2, 512, 4, 3, 4, False, "", True), (1, 512, 4, 1, 4, False, "", True), (1, 512, 2, 3, 8, False, "", True)],
        3072: [(2, 1024, 8, 3, 4, False, "", True)], 7168: [(1, 1024, 4, 1, 4, False, "", True), (1, 1024, 8, 1, 4)]}  # fmt: skip


def widened(text: str, columns: int) -> str:
    """A program captured at the usual width, at another: it says its width in one place."""
    return re.sub(rf"^(axis \w+ = ){CAPTURED}$", rf"\g<1>{columns}", text, flags=re.MULTILINE)


def tried(text: str, columns: int) -> list[Candidate]:
    """What tuning would time on this GPU, the rule of thumb first."""
    from fxfuse import reference
    from fxfuse.kernels.catalogue import choose_kind
    from fxfuse.kernels.configuration import candidates
    from fxfuse.kernels.launch import Prepared, plan
    from fxfuse.program import parse

    program = Prepared(parse(text)).unsummed
    tensors = [t.to("meta") for t in tune_probe.tensors_for(text, (1, 16), columns)]  # as many rows as a tile can have, and more
    kind = choose_kind(program, reference.axis_widths(program, tensors))
    if kind is None:
        return []
    layout = plan(program, kind, tensors, [reference.allocate(program, output, tensors) for output in program.outputs])
    found = candidates(program, kind, layout)
    return [Candidate(None), *[Candidate(kind, config) for config in found[1:]]]


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    for columns in COLUMNS:
        for op, weights in OPS.items():
            for weight in weights:
                forward, *_, backward = [widened(text, columns) for text in programs_of(op, weight, CAPTURED)]
                name = f"{op} frozen" if weight == "frozen" else op
                more = configs("rows", *MORE.get(columns, [])) if weight == "trained" else []
                yield Case(f"{name} bwd", backward, (1, ROWS), columns, [*tried(backward, columns), *more])
                if weight != "frozen":
                    yield Case(f"{name} fwd", forward, (1, ROWS), columns, tried(forward, columns))


if __name__ == "__main__":
    tune_probe.main("benchmarks.tune_probe_segments", cases)
