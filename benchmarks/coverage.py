"""What fxfuse fuses of real architectures, and whether it is right: one row a transformers model type.

    python benchmarks/coverage.py [--models llama,qwen3] [--dtype float32] [--renamed] [--out FILE]

Each type is built from a tiny configuration. The denominator is counted without the compiler (census.py: which
operators an eager forward runs); the same instrument then watches the optimized model and counts what was left
unfused, and what is gone must be inside a fused site that ran (accounting.py: a softmax in `softmax` or `attention`,
a loss in `cross_entropy` or `linear_loss`); fxfuse's own report gives the rules and the reasons. Loss and every
gradient of the fused model and of eager are both judged against eager in float64: ratio = our error / eager's. With
`--renamed` every class, attribute and model_type of the model is given another name first (renaming.py): the table
must come out the same.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import subprocess
import sys
import time
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

import torch  # noqa: E402

from benchmarks import accounting, oracle, renaming, rows, tiny_models  # noqa: E402
from benchmarks.census import KINDS, Census  # noqa: E402
from benchmarks.tables import same_when_renamed  # noqa: E402

LIGER = json.loads((ROOT / "benchmarks" / "liger_coverage.json").read_text())
# Rules that take matmuls in: where they decline, the sites of the census beside the matmul are fused by others all the same.
AROUND = {"attention", "linear_loss", "shared_input_linears", "lora_linear", "nf4_linear"}
CHUNK = 4  # models a process: memory and Dynamo's caches stay small
MORE_SEEDS = range(1, 24)  # drawn when one seed says "wrong": small tensors scatter


def step(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Loss, logits and every gradient of one training step, by name."""
    model.zero_grad(set_to_none=True)
    out = model(**inputs)
    out.loss.backward()
    found = {"loss": out.loss.detach(), "logits": out.logits.detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found["grad " + name] = parameter.grad.detach()
    return found


def exact_step(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same step in float64 throughout: casts inside the model are lifted too."""
    exact = copy.deepcopy(model).double()
    if hasattr(exact, "set_experts_implementation"):
        exact.set_experts_implementation(
            "eager"
        )  # the grouped product knows no float64; a loop over experts does
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with oracle.InFloat64():
            return step(exact, {k: oracle.to64(v) for k, v in inputs.items()})
    finally:
        torch.set_default_dtype(before)


def cast_inputs(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in inputs.items()
    }


class Errors:
    """Squared errors of ours and of eager, pooled over input seeds; ratios by tensor."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.ours: defaultdict[str, float] = defaultdict(float)
        self.eager: defaultdict[str, float] = defaultdict(float)
        self.floor: defaultdict[str, float] = defaultdict(float)
        self.missing: list[str] = []

    def add(
        self, ours: dict[str, torch.Tensor], eager: dict[str, torch.Tensor], ref: dict[str, torch.Tensor]
    ) -> None:
        self.missing += sorted(eager.keys() - ours.keys())
        gradients = [ref[n].flatten() for n in ref if n.startswith("grad ")]
        scale = torch.cat(gradients).square().mean().sqrt().item()
        for name in ours.keys() & eager.keys():
            self.ours[name] += oracle.rmse(ours[name], ref[name]) ** 2
            self.eager[name] += oracle.rmse(eager[name], ref[name]) ** 2
            floor = oracle.floor(ref[name], self.dtype)
            if name.startswith("grad ") and ref[name].square().mean().sqrt().item() < 1e-6 * scale:
                floor = (
                    torch.finfo(self.dtype).eps * scale
                )  # zero in exact arithmetic (a key's bias): noise has no ratio
            if ref[name].numel() == 1:
                floor *= 2  # one number shows one rounding, up to half a unit; there is nothing to average over
            self.floor[name] += floor**2

    def ratios(self) -> dict[str, float]:
        return {n: (self.ours[n] / max(self.eager[n], self.floor[n])) ** 0.5 for n in self.ours}

    def wrong(self) -> dict[str, float]:
        limit = oracle.LIMIT[self.dtype]
        bad = {n: round(r, 2) for n, r in self.ratios().items() if not r <= limit}
        return {**bad, **{n: float("inf") for n in self.missing}}


def read_report(model: torch.nn.Module) -> dict[str, Any]:
    """Fused sites by rule, and what was declined, from fxfuse's own report."""
    import fxfuse

    report = fxfuse.report(model)
    fused: Counter[str] = Counter()
    unlaunched, declined = [], []
    for site in report.sites:
        if site.status == "fused":
            fused[site.rule] += site.count
            if not site.launches:
                unlaunched.append(f"{site.rule} {site.module}")
        else:
            declined.append(
                dict(
                    rule=site.rule,
                    module=site.module,
                    status=site.status,
                    count=site.count,
                    reason=site.reason.splitlines()[0] if site.reason else "",
                    near_miss=site.near_miss,
                )
            )
    graphs = sum(g.graphs for g in report.graphs)
    return dict(
        fused=dict(sorted(fused.items())),
        declined=declined,
        unlaunched=unlaunched,
        graphs=graphs,
        notes=[str(n) for n in report.notes],
        errors=[str(e) for e in report.errors],
    )


def survey(name: str, dtype: torch.dtype, renamed: bool, fuse: bool) -> dict[str, Any]:
    """One row."""
    start = time.perf_counter()
    make = renaming.build if renamed else tiny_models.build
    model = make(name, dtype)
    inputs = cast_inputs(tiny_models.inputs_for(name), dtype)
    row: dict[str, Any] = dict(
        model=name,
        head=tiny_models.MODELS[name].head,
        dtype=str(dtype).split(".")[-1],
        renamed=renamed,
        liger=LIGER["models"].get(
            tiny_models.MODELS[name].config_type or name, LIGER["models"].get(name, [])
        ),
    )
    with Census.of(model) as census:
        eager_loss = model(**inputs).loss.item()
    row |= dict(seen=census.counts(), loss0=eager_loss)
    if not fuse:
        return row | dict(seconds=round(time.perf_counter() - start, 1))
    import fxfuse

    fused_model = fxfuse.optimize(copy.deepcopy(model), remainder="eager")
    errors = Errors(dtype)

    def judge(seed: int) -> None:
        batch = cast_inputs(tiny_models.inputs_for(name, seed), dtype)
        errors.add(step(fused_model, batch), step(model, batch), exact_step(model, batch))

    judge(0)
    first = errors.wrong()
    if first and not errors.missing:
        for seed in MORE_SEEDS:
            judge(seed)
    before = accounting.ledger(fused_model)
    with Census.of(fused_model) as watched:
        fused_model(**inputs)
    inside = accounting.contained(before, accounting.ledger(fused_model))
    ratios = errors.ratios()
    gradients = {n: r for n, r in ratios.items() if n.startswith("grad ")}
    worst = max(gradients, key=gradients.__getitem__)
    row |= dict(
        left=watched.counts(),
        inside=inside,
        unaccounted=accounting.unaccounted(row["seen"], watched.counts(), inside),
        loss_ratio=round(ratios["loss"], 3),
        logits_ratio=round(ratios.get("logits", 0.0), 3),
        grad_ratio=round(gradients[worst], 3),
        worst_grad=worst,
        gradients=len(gradients),
        wrong=errors.wrong(),
        wrong_at_one_seed=len(first),
        **read_report(fused_model),
    )
    left_over = [f"{s.kind} {s.op} {s.module} {list(s.shape)}" for s in watched.sites]
    return row | dict(left_sites=left_over, seconds=round(time.perf_counter() - start, 1))


def work(names: list[str], args: argparse.Namespace) -> None:
    """A child process: one JSON line a model on stdout."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    for name in names:
        torch._dynamo.reset()
        try:
            row = survey(name, getattr(torch, args.dtype), args.renamed, not args.census)
        except Exception as error:
            logging.getLogger("benchmarks").warning("%s", name, exc_info=True)
            row = dict(
                model=name,
                dtype=args.dtype,
                renamed=args.renamed,
                failed=f"{type(error).__name__}: {str(error)[:400]}",
            )
        sys.stdout.write("\x1e" + json.dumps(row) + "\n")
        sys.stdout.flush()


def run_chunk(names: list[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of some models, from a process of their own; a model that kills it is a failed row."""
    command = [sys.executable, __file__, "--work", ",".join(names), "--dtype", args.dtype]
    command += ["--renamed"] if args.renamed else []
    command += ["--census"] if args.census else []
    env = dict(os.environ, OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    try:
        done = subprocess.run(
            command, env=env, stdout=subprocess.PIPE, text=True, timeout=args.limit * len(names)
        )
        text, end = done.stdout, f"the process ended with {done.returncode}"
    except subprocess.TimeoutExpired as late:
        text, end = (late.stdout or b"").decode(), f"over {args.limit * len(names):.0f} s"  # type: ignore[union-attr]
    found = [json.loads(line[1:]) for line in text.split("\n") if line.startswith("\x1e")]
    rest = [n for n in names if n not in {row["model"] for row in found}]
    if not rest:
        return found
    failed = dict(model=rest[0], dtype=args.dtype, renamed=args.renamed, failed=end)
    return [*found, failed, *(run_chunk(rest[1:], args) if rest[1:] else [])]


def served(row: dict[str, Any]) -> tuple[int, int, int]:
    """Sites seen, sites fused, sites declined with a reason (never more than were left)."""
    seen = sum(row["seen"].values())
    left = sum(row.get("left", row["seen"]).values()) + sum(row.get("unaccounted", {}).values())
    reasons = sum(
        d["count"]
        for d in row.get("declined", [])
        if d["reason"] and "internal error" not in d["reason"] and d["rule"] not in AROUND
    )
    return seen, seen - left, min(left, reasons)


def summary(found: list[dict[str, Any]]) -> str:
    lines = [
        f"{'model':18}"
        + "".join(f"{k:>12}" for k in KINDS)
        + f"{'loss':>7}{'grad':>7}  Liger  rules; what was left"
    ]
    total = fused_total = reasoned = 0
    wrong = 0
    for row in found:
        if "failed" in row:
            lines.append(f"{row['model']:18} FAILED {row['failed']}")
            wrong += 1
            continue
        seen, fused, because = served(row)
        total, fused_total, reasoned = total + seen, fused_total + fused, reasoned + because
        wrong += bool(row.get("wrong"))
        cells = "".join(
            f"{str(row['seen'].get(k, 0) - row.get('left', row['seen']).get(k, 0)) + '/' + str(row['seen'].get(k, 0)):>12}"
            for k in KINDS
        )
        rules = " ".join(f"{rule}:{n}" for rule, n in row.get("fused", {}).items())
        left = " ".join(f"{k}:{n}" for k, n in row.get("left", {}).items())
        left += "".join(f" {k}:{n} gone into no program" for k, n in row.get("unaccounted", {}).items())
        bad = f"  WRONG {row['wrong']}" if row.get("wrong") else ""
        lines.append(
            f"{row['model']:18}{cells}{row.get('loss_ratio', 0):7.2f}{row.get('grad_ratio', 0):7.2f}  "
            f"{'yes' if row['liger'] else 'no':5}  {rules}; {left}{bad}"
        )
    share = fused_total / max(total, 1)
    lines.append(
        f"{len(found)} types, {total} sites, {fused_total} fused ({share:.1%}), {reasoned} more declined with a reason, "
        f"{total - fused_total - reasoned} left without one, {wrong} types wrong or failed"
    )
    return "\n".join(lines)


def chunks(names: list[str], size: int) -> list[list[str]]:
    return [names[i : i + size] for i in range(0, len(names), size)]


def main() -> int:
    logging.basicConfig(level=logging.WARNING, format="%(name)s %(message)s")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(tiny_models.MODELS))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument(
        "--renamed", action="store_true", help="rename every class, attribute and model_type first"
    )
    parser.add_argument(
        "--census", action="store_true", help="count the denominator only; fxfuse is not imported"
    )
    parser.add_argument(
        "--out", default=None, help="default: results/coverage.jsonl, rows of the same kind replaced"
    )
    parser.add_argument("--limit", type=float, default=90.0, help="seconds a model")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work.split(","), args)
        return 0
    names = args.models.split(",")
    if unknown := sorted(set(names) - set(tiny_models.MODELS)):
        parser.error(
            f"no tiny configuration for {', '.join(unknown)}; there are {', '.join(tiny_models.MODELS)}"
        )
    start = time.perf_counter()
    path = Path(args.out) if args.out else rows.RESULTS / "coverage.jsonl"
    found: list[dict[str, Any]] = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for part in pool.map(lambda chunk: run_chunk(chunk, args), chunks(names, CHUNK)):
            found += part
            if not args.census:
                save(found, path)
    sys.stdout.write(summary(found) + f"\n{time.perf_counter() - start:.0f} s\n")
    same, other = same_when_renamed(rows.read(path))
    if args.renamed:
        sys.stdout.write(f"{len(same)} types the same as under their own names; different: {', '.join(other) or 'none'}\n")
    bad = [r["model"] for r in found if "failed" in r or r.get("wrong")] + (other if args.renamed else [])
    return 1 if bad else 0


def save(found: list[dict[str, Any]], path: Path) -> None:
    """Rows of the same model, dtype and naming are replaced; the others stay."""
    key = lambda r: (r["model"], r["dtype"], r["renamed"])  # noqa: E731
    new = {key(r) for r in found}
    kept = [r for r in rows.read(path) if key(r) not in new]
    header = rows.Writer(path).header
    path.write_text("".join(json.dumps(r) + "\n" for r in [*kept, *({**r, **header} for r in found)]))


if __name__ == "__main__":
    sys.exit(main())
