"""Every rule at its binding shape: fxfuse against eager, Inductor, Liger-Kernel and Unsloth, in one run on one GPU.

    python benchmarks/kernels.py [--quick] [--only rope,norm] [--out FILE] [--dry]

Order: caches are warmed by parallel processes (compilation only; nothing they time is kept), then one process
checks each contender's outputs and gradients against float64 and times those that are right, forward and
forward+backward, in CUDA graphs over rotating inputs; then a sweep of our own kernels over sizes (cliffs), and the
host cost of one launch inside a compiled block. Unsloth runs in a process of its own, since importing it changes
transformers' classes and Inductor's settings. `--dry` runs the same on a CPU at tiny shapes.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not benchmarks/: this file's name is also a package that transformers looks for

import torch  # noqa: E402

from benchmarks import contenders, rows, timing  # noqa: E402
from benchmarks.chain import chain_inputs, chain_of, host_us, launches_of  # noqa: E402
from benchmarks.judge import Judge, both, forward, fresh, wrong  # noqa: E402
from benchmarks.kernel_cases import Case, Inputs, binding_cases, sweep_cases  # noqa: E402

log = logging.getLogger("benchmarks")


# --- closures ------------------------------------------------------------------------------------------------


def closures(case: Case, fn: Callable[..., Any], backward: bool, device: str) -> list[timing.Closure]:
    """One closure an input set, over as many sets as keep the L2 out of it."""
    touched = case.both_bytes if backward else case.forward_bytes
    sets = []
    for seed in range(timing.sets_for(touched) if device == "cuda" else 1):
        torch.manual_seed(seed)
        sets.append(fresh(case.make(device), grad=True))
    # the forward of a training step, so with gradients on: what it keeps for the backward is part of it
    run = both if backward else forward
    return [partial(run, fn, inputs) for inputs in sets]


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- the three measurements ----------------------------------------------------------------------------------


def served_by(name: str, fn: Callable[..., Any]) -> dict[str, Any]:
    """What really runs: fxfuse may hand a site to Inductor or a library op where that was measured faster."""
    return fn.sites() if isinstance(fn, contenders.Ours) else dict(implementation=name)


def newly_tuned() -> list[str]:
    """The configurations that launches chose since the last call, in order: forward, then backward."""
    from fxfuse.kernels import tuning

    new = [str(config) for key, config in tuning._chosen.items() if key not in _reported]
    _reported.update(tuning._chosen)
    return new


_reported: set[str] = set()


def bench_case(case: Case, names: list[str], copy: float, device: str, out: rows.Writer) -> None:
    """Checks, then times, every contender of one case; one row each and each direction."""
    judge = Judge(case, device)
    passes = [timing.passes_ms(device, *sizes) for sizes in (
        (case.forward_bytes,), (case.forward_bytes, case.both_bytes - case.forward_bytes))]
    release()
    for name in names:
        torch._dynamo.reset()
        base: dict[str, Any] = dict(
            kind="binding" if case.binding else "extra",
            op=case.op,
            shape=case.shape,
            weight=case.weight,
            contender=name,
        )
        start = time.perf_counter()
        try:
            fn = contenders.build(name, case)
            if fn is None:
                continue
            errors = judge.errors(fn)
            base |= dict(errors, first_s=round(time.perf_counter() - start, 2), **served_by(name, fn))
            if name == "fxfuse":
                base["tuned"] = newly_tuned()
            if reason := wrong(name, errors):
                out.write(**base, refused=reason)
                continue
            for backward in (False, True):
                nbytes = case.both_bytes if backward else case.forward_bytes
                t = timing.measure(closures(case, fn, backward, device), graph=case.graph)
                share = nbytes / (t.ms * 1e-3) / copy
                out.write(
                    **base,
                    mode="fwd+bwd" if backward else "fwd",
                    ms=round(t.ms, 5),
                    ms_min=round(t.ms_min, 5),
                    ms_max=round(t.ms_max, 5),
                    how=t.how,
                    gbs=round(nbytes / t.ms / 1e6, 1),
                    share_of_copy=round(share, 4),
                    pass_ms=round(passes[backward], 5),
                    goal=case.goal,
                )
                release()
        except Exception as error:  # a peer that fails is a row, not the end of the run
            log.warning("%s %s: %s", case.name, name, error)
            out.write(**base, failed=f"{type(error).__name__}: {str(error)[:300]}")
        release()


def bench_sweep(cases: list[Case], device: str, out: rows.Writer) -> None:
    """Our kernels over sizes by their rules of thumb, nothing timed; each beside plain passes over as many bytes in the same run."""
    passes: dict[tuple[int, ...], float] = {}
    fns: dict[str, Callable[..., Any]] = {}
    os.environ["FXFUSE_AUTOTUNE"] = "0"
    for case in cases:
        if case.op not in fns:
            fns[case.op] = contenders.Ours(case.fn)
        fn = fns[case.op]
        for backward in (False, True):
            sizes = (case.forward_bytes, case.both_bytes - case.forward_bytes)[:2 if backward else 1]
            try:
                t = timing.measure(closures(case, fn, backward, device), reps=7)
                if sizes not in passes:
                    passes[sizes] = timing.passes_ms(device, *sizes)
                out.write(
                    kind="sweep",
                    op=case.op,
                    shape=case.shape,
                    weight=case.weight,
                    contender="fxfuse",
                    mode="fwd+bwd" if backward else "fwd",
                    ms=round(t.ms, 5),
                    pass_ms=round(passes[sizes], 5),
                    share_of_copy=round(passes[sizes] / t.ms, 4),
                )
            except Exception as error:
                log.warning("sweep %s: %s", case.name, error)
                out.write(
                    kind="sweep",
                    op=case.op,
                    shape=case.shape,
                    contender="fxfuse",
                    failed=f"{type(error).__name__}: {str(error)[:300]}",
                )
        release()
    os.environ.pop("FXFUSE_AUTOTUNE")


def bench_host(names: list[str], device: str, out: rows.Writer, calls: int) -> None:
    """Host cost of one op inside a block: (block with it - block without it) / how often it stands there."""
    length = 16
    case = next(case for case in sweep_cases(dry=True) if case.op == "rms_norm")
    for name in names:
        torch._dynamo.reset()
        base = dict(kind="host", op=case.op, shape="8x64", weight="trained", contender=name)
        try:
            if name in ("fxfuse", "inductor"):
                wrap = contenders.Ours if name == "fxfuse" else torch.compile
                block, bare = (wrap(chain_of(unit, length)) for unit in (case.fn, None))
            else:
                unit = contenders.build(name, case)
                if unit is None:
                    continue
                block, bare = chain_of(unit, length), chain_of(None, length)
            for backward in (False, True):
                x = chain_inputs(device, length)
                bare_x = Inputs(x.args[:2], [0, 1], x.cotangents)
                with_unit, without = host_us((block, x), (bare, bare_x), backward, calls)
                row = dict(
                    host_us=round((with_unit - without) / length, 2),
                    block_us=round(with_unit, 1),
                    bare_us=round(without, 1),
                )
                launches = launches_of(partial(both if backward else forward, block, x)) if name == "fxfuse" else 0
                if launches:
                    row |= dict(launches=launches, us_a_launch=round((with_unit - without) / launches, 2))
                out.write(**base, mode="fwd+bwd" if backward else "fwd", **row)
        except Exception as error:
            log.warning("host %s: %s", name, error)
            out.write(**base, failed=f"{type(error).__name__}: {str(error)[:300]}")


# --- phases --------------------------------------------------------------------------------------------------


def warm(cases: list[Case], names: list[str], device: str) -> None:
    """Compiles what the timed process will load from the caches; runs beside others, so it times nothing."""
    for case in cases:
        for name in names:
            torch._dynamo.reset()
            try:
                fn = contenders.build(name, case)
                if fn is not None:
                    both(fn, fresh(case.make(device), grad=True))
            except Exception as error:
                log.warning("warm %s %s: %s", case.name, name, error)
        release()


def warm_in_parallel(args: argparse.Namespace, names: list[str]) -> None:
    """The warm phase in `--jobs` processes that share the GPU; their autotuning choices are thrown away."""
    env = dict(
        os.environ,
        TORCHINDUCTOR_AUTOTUNE_LOCAL_CACHE="0",
        TORCHINDUCTOR_COMPILE_THREADS="1",
        FXFUSE_CACHE_DIR=tempfile.mkdtemp(prefix="fxfuse-warm-"),
        FXFUSE_COMPILE_PROCESSES="0",
    )
    command = [
        sys.executable,
        __file__,
        "--contenders",
        ",".join(n for n in names if n not in ("eager", "unsloth")),
        *(["--only", args.only] if args.only else []),
        *(["--quick"] if args.quick else []),
        *(["--dry"] if args.dry else []),
        "--phases",
        args.phases,
    ]
    start = time.perf_counter()
    workers = [subprocess.Popen([*command, "--warm", f"{i}/{args.jobs}"], env=env) for i in range(args.jobs)]
    for worker in workers:
        try:
            worker.wait(timeout=max(1.0, args.warm_limit - (time.perf_counter() - start)))
        except subprocess.TimeoutExpired:
            worker.kill()
    log.warning("caches warmed in %.0f s", time.perf_counter() - start)


def selected(cases: list[Case], only: str | None) -> list[Case]:
    return [c for c in cases if not only or any(word in c.name for word in only.split(","))]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default=str(rows.RESULTS / "kernels.jsonl"))
    parser.add_argument("--only", help="words, comma-separated; a case runs if its name holds one")
    parser.add_argument("--contenders", default=",".join(contenders.NAMES))
    parser.add_argument("--phases", default="binding,sweep,host", help="in this order")
    parser.add_argument("--quick", action="store_true", help="4096 columns only; 4 by 2 sizes in the sweep")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU, each once")
    parser.add_argument("--jobs", type=int, default=0, help="processes of the warm phase (0: no warm phase)")
    parser.add_argument(
        "--warm-limit", type=float, default=120.0, help="seconds after which warming is cut off"
    )
    parser.add_argument("--warm", help=argparse.SUPPRESS)
    parser.add_argument("--go", help=argparse.SUPPRESS)
    return parser.parse_args()


def wait_for(flag: str | None) -> None:
    """Imports are done; the GPU is taken when the flag file appears."""
    while flag and not Path(flag).exists():
        time.sleep(0.05)


def unsloth_process(args: argparse.Namespace, flag: str) -> subprocess.Popen[bytes]:
    site = os.environ.get("UNSLOTH_SITE", "")
    env = dict(
        os.environ,
        PYTHONPATH=os.pathsep.join(p for p in (site, os.environ.get("PYTHONPATH", "")) if p),
        UNSLOTH_DISABLE_STATISTICS="1",
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
    )
    command = [
        sys.executable,
        __file__,
        "--out",
        args.out,
        "--contenders",
        "unsloth",
        "--go",
        flag,
        "--phases",
        args.phases.replace("sweep", ""),
        *(["--only", args.only] if args.only else []),
        *(["--quick"] if args.quick else []),
    ]
    return subprocess.Popen(command, env=env)


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(message)s")
    args = parse()
    device = "cpu" if args.dry or not torch.cuda.is_available() else "cuda"
    if device == "cpu":
        args.dry = True
        torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64
    os.environ["FXFUSE_TUNING_PATIENCE"] = "inf"  # as in a second run: no candidate is left out for the sake of a first step
    names = args.contenders.split(",")
    cases = selected(binding_cases(args.dry), args.only)
    if args.quick and not args.dry:
        cases = [c for c in cases if "x2048" not in c.shape and "8192x8192" not in c.shape]
    sweep = selected(sweep_cases(args.dry, args.quick), args.only)
    if args.warm:
        part, parts = map(int, args.warm.split("/"))
        if "binding" in args.phases:
            warm(cases[part::parts], [n for n in names if n not in ("eager", "unsloth")], device)
        if "sweep" in args.phases:
            os.environ["FXFUSE_AUTOTUNE"] = "0"
            few = [c for c in sweep if c.shape.split("x")[0] == sweep[0].shape.split("x")[0]]
            warm(few[part::parts], ["fxfuse"], device)
        return
    alone = names == ["unsloth"]
    if alone:
        import unsloth  # noqa: F401
    wait_for(args.go)
    other = None
    if "unsloth" in names and not alone:
        names.remove("unsloth")
        if device == "cuda":
            flag = tempfile.mktemp(prefix="go-")
            other = unsloth_process(args, flag)
    if args.jobs:
        warm_in_parallel(args, names)
        os.environ["FXFUSE_COMPILE_PROCESSES"] = "0"  # what is needed is on disk
    out = rows.Writer(args.out)
    copy = timing.copy_bandwidth(device)
    out.write(kind="ceiling", op="copy", shape="4 GiB", contender="torch", gbs=round(copy / 1e9, 1))
    start = time.perf_counter()
    for phase in args.phases.split(","):
        if phase == "binding":
            for case in cases:
                bench_case(case, names, copy, device, out)
        elif phase == "sweep" and "fxfuse" in names:
            bench_sweep(sweep, device, out)
        elif phase == "host":
            bench_host(names, device, out, calls=2 if args.dry else 10)
        log.warning("%s: %.0f s", phase, time.perf_counter() - start)
    if other is not None:
        Path(flag).touch()
        other.wait(timeout=240)
    log.warning("%d rows in %s, %.0f s", len(rows.read(args.out)), args.out, time.perf_counter() - start)


if __name__ == "__main__":
    main()
