"""Which configuration of a schedule is fastest on this GPU: a table of candidates for the cases that are not at the goal yet.

    python -m benchmarks.tune_probe [--cases NAME,NAME] [--jobs 14]
    TRITON_INTERPRET=1 python -m benchmarks.tune_probe --dry      # a few rows on the CPU: the logic alone

Each case is one launch of a row program as `benchmarks/kernels.py` has it; its candidates are timed like the kernels there
(CUDA graphs over rotating inputs). All kernels are compiled first, in processes of their own. The choices that the table suggests
go by hand into `kernels/configuration.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import kernel_cases
from benchmarks.timing import copy_bandwidth, measure, pass_closures, sets_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEXTS = "FXFUSE_PROBE_TEXTS"  # a file in which the main process leaves the program texts for the others


@dataclass(frozen=True)
class Candidate:
    """kind None: what the launcher chooses itself. `early`: the second stage is set up while the first runs."""

    kind: str | None
    config: Any = None
    early: bool = True

    def __str__(self) -> str:
        if self.config is None:
            return self.kind or "as chosen"
        c = self.config
        extra = f"{' reload' if c.reload else ''}{f' hints={c.hints}' if c.hints else ''}{'' if self.early else ' late'}"
        return f"{self.kind:6} rows={c.rows:<2} block={c.block:<5} warps={c.warps:<2} stages={c.stages} per_unit={c.per_unit}{extra}"


@dataclass
class Case:
    """One launch: a program text, the sizes of its leading dimensions, its columns; passes: tensors of full size moved."""

    name: str
    text: str
    leading: tuple[int, ...]
    columns: int
    candidates: list[Candidate]
    pair: tuple[int, ...] | None = None  # leading dimensions of the second set of tensors
    peer: Callable[[], Callable[..., object]] | None = None


@cache
def programs_of(op: str, weight: str = "", columns: int = 64) -> tuple[str, ...]:
    """The launches of a case of kernel_cases at its true width: forward, then backward."""
    path = Path(os.environ.setdefault(TEXTS, str(Path(tempfile.mkdtemp()) / "programs.json")))
    known = json.loads(path.read_text()) if path.exists() else {}
    key = f"{op}/{weight}/{columns}"
    if key not in known:
        path.write_text(json.dumps(known | {key: _captured(op, weight, columns)}))
        return programs_of.__wrapped__(op, weight, columns)
    return tuple(known[key])


def _captured(op: str, weight: str, columns: int) -> list[str]:
    """The programs that our backend launches for a few rows on the CPU."""
    import fxfuse.bufferize as bufferize
    from fxfuse.backend import Backend

    texts: list[str] = []
    plain = bufferize.launcher

    def recorded(text: str, device: str) -> Any:
        texts.append(text)
        return plain(text, device)

    heads = [c for c in kernel_cases.rope_cases(2, 8, 4, 2, 128)] if "rope" in op else []
    cases = heads or [*kernel_cases.norm_cases(8, columns), *kernel_cases.gate_cases(8, columns)]
    case = next(c for c in cases if c.op == op and (not weight or c.weight == weight))
    inputs = case.make("cpu")
    for index in inputs.wrt:
        inputs.args[index].requires_grad_()
    bufferize.launcher = recorded
    try:
        results = torch.compile(case.fn, backend=Backend(validate="off"), dynamic=True)(*inputs.args)
        results = results if isinstance(results, tuple) else (results,)
        torch.autograd.grad(results, [inputs.args[i] for i in inputs.wrt], inputs.cotangents)
    finally:
        bufferize.launcher = plain
    torch.compiler.reset()
    return list(dict.fromkeys(texts))


def tensors_for(text: str, leading: tuple[int, ...], columns: int) -> list[Tensor]:
    """Contiguous arguments."""
    from fxfuse import reference
    from fxfuse.program import parse

    made = []
    for argument in parse(text).arguments:
        width = argument.columns if isinstance(argument.columns, int) else columns if argument.columns else 1
        sizes = [n if varies else 1 for n, varies in zip(leading, argument.rows, strict=True)]
        made.append(torch.randn(*sizes, width, device=DEVICE).to(reference.torch_dtype(argument.dtype)))
    return made


def configs(kind: str, *rows: tuple, early: bool = True) -> list[Candidate]:
    """(rows, block, warps, stages, per_unit[, reload[, hints]])"""
    from fxfuse.kernels.configuration import Config

    return [Candidate(kind, Config(*row), early) for row in rows]


def cases() -> Iterator[Case]:
    as_chosen = [Candidate(None)]
    for op in ("rms_norm", "layer_norm"):
        def backward(columns: int, op: str = op) -> str:
            return programs_of(op, "trained", columns)[-1]

        wide = [(1, 0, 4, 3, 2), (1, 0, 4, 3, 4), (1, 0, 8, 3, 1), (1, 0, 8, 3, 2), (1, 0, 8, 3, 4), (1, 0, 8, 1, 2), (1, 0, 8, 1, 4),
                (1, 0, 16, 3, 1), (1, 0, 16, 3, 2), (1, 0, 16, 1, 2), (1, 0, 8, 3, 2, False, "loads"),
                (1, 0, 8, 1, 4, True), (1, 0, 8, 1, 2, True)]
        yield Case(f"{op} bwd", backward(4096), (1, 8192), 4096, [
            *as_chosen, *configs("rows", *wide, (2, 0, 16, 2, 1), (2, 0, 8, 2, 1)), *configs("rows", wide[3], early=False),
            *configs("looped", (1, 2048, 8, 1, 2), (1, 4096, 8, 1, 2))])
        yield Case(f"{op} bwd", backward(2048), (1, 8192), 2048, [
            *as_chosen, *configs("rows", *wide, (1, 0, 4, 3, 8), (1, 0, 4, 1, 8), (2, 0, 8, 3, 1), (2, 0, 8, 3, 2), (2, 0, 8, 1, 4),
                                 (4, 0, 16, 3, 1), (4, 0, 8, 3, 1)), *configs("rows", wide[3], early=False)])
        yield Case(f"{op} bwd", backward(8192), (1, 8192), 8192, [
            *as_chosen, *configs("rows", (1, 0, 16, 3, 1), (1, 0, 16, 3, 2), (1, 0, 16, 2, 1), (1, 0, 32, 3, 1), (1, 0, 16, 1, 2),
                                 (1, 0, 16, 1, 2, True), (1, 0, 8, 3, 1), (1, 0, 8, 3, 2)),
            *configs("looped", (1, 2048, 8, 1, 2), (1, 4096, 16, 1, 2))])
        long = [(1, b, w, 1, u) for b, w in ((2048, 16), (4096, 16), (8192, 16), (4096, 32), (4096, 8)) for u in (1, 2)]
        yield Case(f"{op} bwd", backward(16384), (1, 8192), 16384, [
            *as_chosen, *configs("looped", *long), *configs("rows", (1, 0, 16, 1, 1, True), (1, 0, 32, 1, 1, True)),
            Candidate("split")])
        for columns in (1024, 4096):
            yield Case(f"{op} bwd", backward(columns), (1, 512), columns, [
                *as_chosen, *configs("rows", (1, 0, 8, 3, 1), (1, 0, 8, 3, 2), (1, 0, 8, 3, 4), (1, 0, 8, 1, 1), (1, 0, 8, 1, 2),
                                     (1, 0, 8, 1, 4), (2, 0, 8, 3, 2), (1, 0, 4, 3, 4), (1, 0, 4, 1, 4)),
                *configs("rows", (1, 0, 8, 3, 2), early=False)])
    yield from maps()
    yield from rows_without_sums()


def maps() -> Iterator[Case]:
    blocks = [(1, 1024, 4), (1, 1024, 2), (1, 512, 2), (1, 2048, 4), (1, 2048, 8), (1, 512, 8), (1, 512, 4), (1, 1024, 8),
              (1, 4096, 8), (1, 8192, 8)]
    plain = configs("tiled", *blocks)
    hinted = [Candidate("tiled", replace(c.config, hints=h)) for c in plain[:6] for h in ("loads", "all")]
    for op in ("relu2", "softcap"):
        text = programs_of(f"activation[{op}]", "", 14336)[0]
        function = getattr(kernel_cases, op)
        yield Case(f"{op} fwd", text, (1, 8192), 14336, [Candidate(None), *plain, *hinted], peer=lambda f=function: torch.compile(f))


def rows_without_sums() -> Iterator[Case]:
    text = programs_of("residual_norm", "frozen", 8192)[0]
    wide = [(1, 0, w, 1, 1, reload, hints) for w in (8, 16, 32) for reload, hints in
            ((False, ""), (False, "loads"), (False, "all"), (True, ""), (True, "all"))]
    yield Case("residual_norm fwd", text, (1, 8192), 8192, [
        Candidate(None), *configs("rows", *wide), *configs("looped", (1, 4096, 8, 1), (1, 4096, 16, 1), (1, 8192, 16, 1))],
        peer=lambda: torch.compile(kernel_cases.residual_norm))
    text = programs_of("softmax", "", 4096)[-1]
    yield Case("softmax bwd", text, (1, 8192), 4096, [Candidate(None), *configs(
        "rows",
        *[(1, 0, w, 1, 1, False, h) for w in (4, 8, 16) for h in ("", "loads", "all")], (2, 0, 8), (2, 0, 16), (1, 0, 8, 1, 1, True))])
    text = programs_of("rms_norm", "frozen", 2048)[0]
    yield Case("rms_norm fwd", text, (1, 8192), 2048, [Candidate(None), *configs(
        "rows", *[(r, 0, w, 1, 1, False, h) for r, w in ((1, 4), (1, 8), (2, 8), (1, 2)) for h in ("", "loads", "all")])])
    text = programs_of("layer_norm", "frozen", 4096)[0]
    yield Case("layer_norm fwd", text, (1, 8192), 4096, [Candidate(None), *configs(
        "rows", *[(1, 0, w, 1, 1, False, h) for w in (4, 8, 16) for h in ("", "loads")])])
    text = programs_of("qk_norm_rope", "frozen")[0]
    nested = [(r, 0, w) for r, w in ((4, 1), (8, 1), (8, 2), (16, 1), (16, 2), (16, 4), (32, 1), (32, 2), (32, 4), (32, 8))]
    nested += [(r, 0, w, 1, 1, False, "loads") for r, w in ((8, 1), (32, 2), (32, 4))]
    yield Case("qk_norm_rope fwd", text, (2, 4096, 32), 128, [Candidate(None), *configs("rows", *nested)], pair=(2, 4096, 8))


def launch_of(case: Case, candidate: Candidate) -> Callable[..., object]:
    """A function of the tensors (two lists of a pair), launched as the candidate says."""
    from fxfuse.kernels import launch, splitting
    from fxfuse.kernels.early_sums import with_early_sums
    from fxfuse.kernels.pair import PreparedPair
    from fxfuse.program import parse

    program = parse(case.text)
    if candidate.kind == "split":
        split = launch.SplitLaunch(splitting.split_sums(with_early_sums(program)))
        return lambda tensors: split(tensors, None)
    pinned = launch.Prepared(program, candidate.kind, candidate.config)
    if case.pair is None:
        return pinned
    both = PreparedPair(program)
    both.single = pinned
    return both


def run(case: Case, candidate: Candidate, sets: list[tuple]) -> float:
    """Milliseconds of one call."""
    from fxfuse.kernels import abilities

    plain = abilities.of_device
    abilities.of_device = plain if candidate.early else lambda device: plain(device)._replace(early=False)
    try:
        function = launch_of(case, candidate)
        return measure([lambda s=s: function(*s) for s in sets]).ms
    finally:
        abilities.of_device = plain


def inputs(case: Case, scale: float = 1.0) -> tuple:
    cut = [tuple(max(16, int(n * scale)) if n > 32 else n for n in leading) for leading in (case.leading, case.pair or ())]
    return tuple(tensors_for(case.text, leading, case.columns) for leading in cut if leading)


def compile_share(names: set[str], index: int, count: int) -> None:
    """Compile every `count`-th candidate on few rows, into Triton's cache on disk."""
    kernels: dict[tuple, tuple[Case, Candidate]] = {}
    for case in cases():
        for candidate in case.candidates if not names or case.name in names else ():
            config = candidate.config and replace(candidate.config, per_unit=1)
            kernels.setdefault((case.name, case.columns, candidate.kind, config, candidate.early), (case, candidate))
    for case, candidate in list(kernels.values())[index::count]:
        try:
            run(case, candidate, [inputs(case, 1 / 64)])
        except Exception as error:  # reported where it is timed
            print(f"{case.name} {candidate}: {type(error).__name__} {error}", file=sys.stderr)


def moved(case: Case, results: Any, arguments: tuple) -> int:
    """Bytes: each argument and each result once."""
    flat = [t for group in (*arguments, *(results if case.pair else [results])) for t in group]
    return sum(t.numel() * t.element_size() for t in flat)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default="")
    parser.add_argument("--jobs", type=int, default=14)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--share", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["FXFUSE_AUTOTUNE"] = "0"
    os.environ.setdefault(TEXTS, str(Path(tempfile.mkdtemp()) / "programs.json"))
    names = {name for name in options.cases.split(",") if name}
    if options.share:
        index, count = map(int, options.share.split("/"))
        compile_share(names, index, count)
        return
    start = time.perf_counter()
    listed = [case for case in cases() if not names or case.name in names]
    if not options.dry:
        command = [sys.executable, "-m", "benchmarks.tune_probe", "--cases", options.cases, "--share"]
        workers = [subprocess.Popen([*command, f"{i}/{options.jobs}"]) for i in range(options.jobs)]
        for worker in workers:
            worker.wait()
    print(f"compiled in {time.perf_counter() - start:.0f} s; copy {copy_bandwidth(DEVICE) / 1e12:.2f} TB/s")
    for case in listed:
        try:
            table(case, 1 / 512 if options.dry else 1.0)
        except Exception as error:  # the other cases still tell
            print(f"\n{case.name} {case.columns}: {type(error).__name__} {str(error)[:300]}")
    print(f"{time.perf_counter() - start:.0f} s")


def table(case: Case, scale: float) -> None:
    """Times the candidates of a case and prints them, fastest first."""
    sets = [inputs(case, scale)]
    results = launch_of(case, Candidate(None))(*sets[0])
    nbytes = moved(case, results, sets[0])
    sets += [inputs(case, scale) for _ in range(sets_for(nbytes, most=24) - 1)]
    floor = measure(pass_closures(nbytes, DEVICE)).ms
    size = "x".join(map(str, (*case.leading, case.columns)))
    print(f"\n{case.name} {size}: {nbytes / 2**20:.0f} MiB, one pass over as much {floor * 1e3:.1f} us")
    rows = []
    if case.peer is not None:
        peer = case.peer()
        one = sets[0][0]
        rows.append((measure([lambda: peer(*one)]).ms, "inductor (one set of inputs)"))
    for candidate in case.candidates:
        try:
            rows.append((run(case, candidate, sets), str(candidate)))
        except Exception as error:
            print(f"    {candidate}: {type(error).__name__} {str(error)[:150]}")
    for ms, label in sorted(rows):
        print(f"  {ms * 1e3:8.1f} us {floor / ms:6.1%}  {label}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
