"""Which configuration of a schedule is fastest on this GPU: a table of candidates for the cases that are not at the goal yet.

    python -m benchmarks.tune_probe [--cases "rms_norm fwd,rope fwd"] [--jobs 14]
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
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import kernel_cases
from benchmarks.timing import copy_bandwidth, measure, pass_closures, sets_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEXTS = "FXFUSE_PROBE_TEXTS"  # a file in which the main process leaves the program texts for the others


@dataclass(frozen=True)
class Candidate:
    """kind None: the launcher's rule of thumb; "tuned": what it chooses by timing. `early`: the second stage is set up while the
    first runs. `alone`: the first stage only."""

    kind: str | None
    config: Any = None
    early: bool = True
    alone: bool = False

    def __str__(self) -> str:
        if self.config is None:
            return self.kind or "rule of thumb"
        c = self.config
        extra = f"{' reload' if c.reload else ''}{f' hints={c.hints}' if c.hints else ''}{' early' if c.early else ''}"
        extra += f" resident={c.resident}" if c.resident else ""
        extra += f"{'' if self.early else ' late'}{' alone' if self.alone else ''}"
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
    transposed: bool = False  # the second and third dimension lie the other way round


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
    for arg in inputs.args:  # columns are fixed in a model
        torch._dynamo.mark_static(arg, arg.dim() - 1)
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
    """(rows, block, warps, stages, per_unit[, reload[, hints[, early]]])"""
    from fxfuse.kernels.configuration import Config

    return [Candidate(kind, Config(*row), early) for row in rows]


def cases() -> Iterator[Case]:
    yield from forwards()
    yield from long_forwards()
    yield from backwards_with_sums()
    yield from softmax_backward()
    yield from heads()


CHOICES = [Candidate(None), Candidate("tuned")]
HINTS = ("", "loads", "all")


def forwards() -> Iterator[Case]:
    """Norms of one tensor: is it the warps, what becomes of the data in the cache, or the registers."""
    for op, columns, warps in (("rms_norm", 1024, (1, 2, 4)), ("rms_norm", 2048, (4,)), ("rms_norm", 4096, (4, 8)),
                               ("rms_norm", 8192, (4, 8)), ("layer_norm", 2048, (4,)), ("layer_norm", 4096, (2, 8)),
                               ("layer_norm", 8192, (4, 8))):
        tried = [(1, 0, w, 1, 1, False, h) for w in warps for h in HINTS]
        if columns == 8192:
            tried += [(1, 0, w, 1, 1, True, h) for w in (8, 16) for h in ("", "all")]
        if columns <= 2048:
            tried += [(2, 0, 4, 1, 1, False, "loads"), (2, 0, 2, 1, 1, False, "loads"), (2, 0, 4)]
        yield Case(f"{op} fwd", programs_of(op, "trained", columns)[0], (1, 8192), columns, [*CHOICES, *configs("rows", *tried)])


def long_forwards() -> Iterator[Case]:
    """Rows that fill a multiprocessor: held, read again, or walked over; of lengths that are no power of 2 too."""
    for op, columns in (("rms_norm", 5120), ("rms_norm", 12288), ("rms_norm", 16384), ("softmax", 12288)):
        held = [(1, 0, w, 1, 1, reload, h) for w in (8, 16, 32) for reload in (False, True) for h in ("", "all")]
        walked = [(1, block, w) for block, w in ((2048, 8), (4096, 8), (4096, 16), (8192, 16))]
        yield Case(f"{op} long", programs_of(op, "" if op == "softmax" else "trained", columns)[0], (1, 8192), columns,
                   [*CHOICES, *configs("rows", *held), *configs("looped", *walked)])  # fmt: skip


def backwards_with_sums() -> Iterator[Case]:
    """Norms with a trained weight: of usual rows, of few, of long ones."""
    for op in ("rms_norm", "layer_norm"):
        tried = [(2, 0, 4, 3, 4), (1, 0, 4, 3, 4), (2, 0, 4, 3, 2), (4, 0, 4, 3, 4), (4, 0, 8, 3, 2), (1, 0, 2, 3, 8)]
        early = [(r, 0, 4, 3, u, False, "", True) for r, u in ((2, 4), (2, 2), (1, 4), (1, 3))]
        yield Case(f"{op} bwd", programs_of(op, "trained", 2048)[-1], (1, 8192), 2048, [*CHOICES, *configs("rows", *tried[:3], *early)])
        for rows in (512, 32768):
            yield Case(f"{op} bwd", programs_of(op, "trained", 1024)[-1], (1, rows), 1024, [
                *CHOICES, *configs("rows", *tried, (1, 0, 8, 3, 2), (1, 0, 4, 1, 4))])
        ahead = [(1, 0, w, s, 1, False, "", True) for w, s in ((16, 3), (16, 1), (32, 3), (32, 1))]
        again = [(1, 0, w, 1, u, True) for w, u in ((16, 1), (32, 1), (16, 2), (8, 2), (8, 3))]
        for columns in (12288, 16384):
            yield Case(f"{op} bwd long", programs_of(op, "trained", columns)[-1], (1, 8192), columns, [
                *CHOICES, *configs("rows", *ahead, *again), *configs("looped", (1, 4096, 16), (1, 4096, 8, 1, 2))])
    early = (False, "", True)
    tried = [(1, 0, w, s, 1, *early) for w, s in ((16, 3), (16, 1), (8, 3), (32, 3))] + [(1, 0, 16, 1, 1, True)]
    yield Case("gated_norm bwd", programs_of("gated_norm", "trained", 8192)[-1], (1, 8192), 8192, [
        *CHOICES, *configs("rows", *tried), *configs("looped", (1, 4096, 8, 1, 2), (1, 4096, 8), (1, 2048, 4, 1, 4))])


def softmax_backward() -> Iterator[Case]:
    """Rows of 5120 columns are held as 8192."""
    for columns in (4096, 5120, 8192):
        tried = [(1, 0, w, 1, 1, False, h) for w in (4, 8, 16) for h in ("", "all")]
        yield Case("softmax bwd", programs_of("softmax", "", columns)[-1], (1, 8192), columns, [
            *CHOICES, *configs("rows", *tried), *configs("looped", (1, 1024, 4), (1, 1024, 8))])


def heads() -> Iterator[Case]:
    """Query and key in one launch: as the projections leave them, or transposed as a rotation without a norm is traced."""
    nested = [(4, 0, 1), (8, 0, 1), (8, 0, 2), (16, 0, 1), (16, 0, 2), (16, 0, 2, 1, 1, False, "all"), (8, 0, 1, 1, 1, False, "all")]
    forward, *_, backward = programs_of("qk_norm_rope", "frozen")
    for way, text in (("fwd", forward), ("bwd", backward)):
        yield Case(f"qk_norm_rope {way}", text, (2, 4096, 32), 128, [*CHOICES, *configs("rows", *nested)], pair=(2, 4096, 8))
    for queries, keys in ((32, 8), (28, 4)):
        yield Case("rope fwd", programs_of("rope")[0], (2, queries, 4096), 128, [*CHOICES, *configs("rows", *nested)],
                   pair=(2, keys, 4096), transposed=True)


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
    pinned = launch.Prepared(program, None if candidate.kind == "tuned" else candidate.kind, candidate.config)
    if case.pair is None:
        return pinned
    both = PreparedPair(program)
    both.single = pinned
    return both


def run(case: Case, candidate: Candidate, sets: list[tuple]) -> float:
    """Milliseconds of one call."""
    from fxfuse.kernels import abilities, single, tuning

    plain = abilities.of_device
    tuning._chosen.clear()
    with ExitStack() as changes:
        changes.enter_context(mock.patch.dict(os.environ, FXFUSE_AUTOTUNE="1" if candidate.kind == "tuned" else "0"))
        if not candidate.early:
            changes.enter_context(mock.patch.object(abilities, "of_device", lambda device: plain(device)._replace(early=False)))
        if candidate.alone:
            changes.enter_context(mock.patch.object(single.Finish, "__call__", return_value=None))
            changes.enter_context(mock.patch.object(single.Launch, "direct", return_value=None))
        function = launch_of(case, candidate)
        return measure([lambda s=s: function(*s) for s in sets]).ms


def inputs(case: Case, scale: float = 1.0) -> tuple:
    cut = [tuple(max(16, int(n * scale)) if n > 32 else n for n in leading) for leading in (case.leading, case.pair or ())]
    lists = [tensors_for(case.text, leading, case.columns) for leading in cut if leading]
    return tuple([t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors] if case.transposed else tensors for tensors in lists)


def compile_share(listed: list[Case], index: int, count: int) -> None:
    """Compile every `count`-th candidate on few rows, into Triton's cache on disk."""
    kernels: dict[tuple, tuple[Case, Candidate]] = {}
    for case in listed:
        for candidate in case.candidates:
            if candidate.kind == "tuned":
                continue
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


def main(module: str = "benchmarks.tune_probe", cases: Callable[[], Iterator[Case]] = cases) -> None:
    """Compiles the candidates of all cases, times them, and prints the tables. `module`: what the other processes run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", default="")
    parser.add_argument("--jobs", type=int, default=14)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--share", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ |= {"FXFUSE_AUTOTUNE": "0", "FXFUSE_COMPILE_PROCESSES": "0", "FXFUSE_TUNING_PATIENCE": "inf"}
    os.environ.setdefault(TEXTS, str(Path(tempfile.mkdtemp()) / "programs.json"))
    names = {name for name in options.cases.split(",") if name}
    start = time.perf_counter()
    listed = [case for case in cases() if not names or case.name in names]
    if options.share:
        index, count = map(int, options.share.split("/"))
        compile_share(listed, index, count)
        return
    if not options.dry:
        command = [sys.executable, "-m", module, "--cases", options.cases, "--share"]
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
    from fxfuse.kernels import tuning

    sets = [inputs(case, scale)]
    results = launch_of(case, Candidate(None))(*sets[0])
    nbytes = moved(case, results, sets[0])
    sets += [inputs(case, scale) for _ in range(sets_for(nbytes, most=24) - 1)]
    floor = measure(pass_closures(nbytes, DEVICE)).ms
    size = "x".join(map(str, (*case.leading, case.columns)))
    print(f"\n{case.name} {size}: {nbytes / 2**20:.0f} MiB, one pass over as much {floor * 1e3:.1f} us")
    rows = []
    for candidate in case.candidates:
        try:
            ms = run(case, candidate, sets)
            rows.append((ms, f"tuned: {next(iter(tuning._chosen.values()), None)}" if candidate.kind == "tuned" else str(candidate)))
        except Exception as error:
            print(f"    {candidate}: {type(error).__name__} {str(error)[:150]}")
    for ms, label in sorted(rows):
        print(f"  {ms * 1e3:8.1f} us {floor / ms:6.1%}  {label}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
