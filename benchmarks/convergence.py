"""Does fused QLoRA learn as eager does? Supervised fine-tuning of a small pretrained llama, five runs, judged by eager's own noise.

    python benchmarks/convergence.py [--seconds 20] [--steps 300] [--out FILE] [--tiny]
    python benchmarks/convergence.py --judge [--out FILE]      # a run that was ended before its verdict: from the rows that it left

The model: pretrained here for ``--seconds`` on one half of the Python files there are (small_model.py), then NF4, double-quantized,
with float32 adapters of rank 16 on every linear, under bfloat16 autocast: QLoRA as PEFT sets it up. The task: write the docstring of
a function, given what stands above it; functions of the other half of the files, the loss on the docstring alone, examples packed.

Eager with seeds 0, 1, 2 (of adapters and order of examples), fused with seeds 0, 1. How far a fused curve is from eager's:

    end       mean of the last third of the steps: how far from the mean of eager's seeds, in standard deviations between them
    windows   means of 20 steps: the largest such distance, in the standard deviation between seeds, pooled over windows
    paired    the same between the fused run and eager's of the same seed, which saw the same examples in the same order

Same curves: end within 2, windows within 3, paired within 1.
"""

from __future__ import annotations

import argparse
import ast
import copy
import gc
import importlib
import importlib.util
import json
import random
import statistics
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    importlib.import_module("benchmarks")
    del sys.path[0]  # its folder `kernels` would pass for the package of that name, which bitsandbytes tries
    if importlib.util.find_spec("fxfuse") is None:
        sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks import rows  # noqa: E402
from benchmarks.small_model import Recipe, sources, tokenize, trained  # noqa: E402
from benchmarks.workloads import ALL_LINEARS, quantize_nf4  # noqa: E402

RECIPE = Recipe(layers=6, characters=24_000_000, held=2)
TINY = Recipe(hidden=64, layers=2, vocabulary=512, batch=4, length=64, characters=600_000, held=2)
EAGER_SEEDS, FUSED_SEEDS = (0, 1, 2), (0, 1)
LIMITS = dict(end=2.0, windows=3.0, paired=1.0)
Curve = Sequence[float]


# --- the text --------------------------------------------------------------------------------------------------------


def documented(text: str) -> Iterator[tuple[str, str]]:
    """(what stands above, docstring) of the functions and classes of a file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(text)
    except (SyntaxError, ValueError):  # templates, and files that test the parser
        return
    lines = text.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            doc = ast.get_docstring(node)
            if doc and len(doc) > 20:
                head = "\n".join(lines[node.lineno - 1 : node.body[0].lineno - 1])
                yield textwrap.dedent(head), doc


@dataclass(frozen=True)
class Examples:
    """Packed: int64 [rows, length] tokens, and labels with -100 where the question stands."""

    ids: Tensor
    labels: Tensor

    @classmethod
    def of(cls, texts: list[str], tokenizer: Any, length: int) -> Examples:
        pairs = [pair for text in texts for pair in documented(text)]
        random.Random(0).shuffle(pairs)
        questions = tokenizer.encode_batch([f'{head}\n    """' for head, _ in pairs])
        answers = tokenizer.encode_batch([f'{doc}"""\n\n' for _, doc in pairs])
        ids: list[int] = []
        labels: list[int] = []
        for question, answer in zip(questions, answers, strict=True):
            ids += question.ids + answer.ids
            labels += [-100] * len(question.ids) + answer.ids
        whole = len(ids) // length * length
        return cls(torch.tensor(ids[:whole]).view(-1, length), torch.tensor(labels[:whole]).view(-1, length))

    def batches(self, size: int, seed: int, device: str) -> Iterator[dict[str, Tensor]]:
        """In an order of this seed, epoch after epoch."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            for rows_ in torch.randperm(len(self.ids), generator=generator).split(size):
                if len(rows_) == size:
                    yield {"input_ids": self.ids[rows_].to(device), "labels": self.labels[rows_].to(device)}


# --- a run -----------------------------------------------------------------------------------------------------------


def adapted(base: dict[str, Tensor], config: Any, seed: int, device: str) -> Any:
    """The pretrained model in NF4 with new adapters."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(device)
    model.load_state_dict(base)
    quantize_nf4(model)
    torch.manual_seed(seed)
    settings = LoraConfig(r=16, lora_alpha=16, lora_dropout=0.0, task_type="CAUSAL_LM", target_modules=list(ALL_LINEARS))
    return get_peft_model(model, settings).train()


def tune(model: Any, batches: Iterator[dict[str, Tensor]], steps: int, device: str) -> tuple[list[float], list[float]]:
    """Loss and milliseconds of each step; AdamW, 10 steps of warm-up, linear decay, gradients clipped at 1."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-4, weight_decay=0.0, fused=device == "cuda")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, (n + 1) / 10) * (1 - n / steps))
    losses, times = [], []
    for _ in range(steps):
        batch = next(batches)
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        times.append((time.perf_counter() - start) * 1e3)
    return losses, times


# --- the judgement ---------------------------------------------------------------------------------------------------


def means(curve: Curve, window: int) -> list[float]:
    """Of windows without overlap."""
    return [statistics.fmean(curve[start : start + window]) for start in range(0, len(curve) - window + 1, window)]


def judged(eager: dict[int, Curve], fused: dict[int, Curve], window: int = 20) -> dict[int, dict[str, float]]:
    """For each fused seed: end, windows and paired distance (see above), in standard deviations between eager's seeds."""
    last = len(next(iter(eager.values()))) // 3
    ends = [statistics.fmean(curve[-last:]) for curve in eager.values()]
    averaged = {seed: means(curve, window) for seed, curve in eager.items()}
    places = list(zip(*averaged.values(), strict=True))
    centre = [statistics.fmean(place) for place in places]
    pooled = statistics.fmean(statistics.variance(place) for place in places) ** 0.5
    found = {}
    for seed, curve in fused.items():
        ours = means(curve, window)
        found[seed] = dict(
            end=abs(statistics.fmean(curve[-last:]) - statistics.fmean(ends)) / statistics.stdev(ends),
            windows=max(abs(a - b) for a, b in zip(ours, centre, strict=True)) / pooled,
            paired=max(abs(a - b) for a, b in zip(ours, averaged[seed], strict=True)) / pooled,
        )
    return found


def faults(verdict: dict[int, dict[str, float]]) -> list[str]:
    """Why the curves are not the same; empty when they are."""
    return [f"seed {seed}: {name} is {value:.2f} standard deviations away, {LIMITS[name]:.0f} allowed"
            for seed, apart in verdict.items() for name, value in apart.items() if not value <= LIMITS[name]]  # fmt: skip


def judge(path: str) -> int:
    """Writes the verdict of the last run's rows."""
    found = [row for row in rows.read(Path(path)) if row["kind"] == "run"]
    found = [row for row in found if row["run"] == found[-1]["run"]]
    curves: dict[str, dict[int, Curve]] = {"hf": {}, "fxfuse": {}}
    for row in found:
        curves[row["contender"]][row["seed"]] = row["losses"]
    verdict = judged(curves["hf"], curves["fxfuse"], window=max(2, found[-1]["steps"] // 15))
    told = verdict_row(verdict)
    with Path(path).open("a") as file:
        file.write(json.dumps(found[-1] | {"contender": None, "seed": None, "losses": [], **told}) + "\n")
    sys.stdout.write(f"{verdict}; {'; '.join(told['faults']) or 'the same curves'}\n")
    return len(told["faults"])


def verdict_row(verdict: dict[int, dict[str, float]]) -> dict[str, Any]:
    why = faults(verdict)
    return dict(kind="verdict", apart={str(seed): {k: round(v, 3) for k, v in found.items()} for seed, found in verdict.items()},
                limits=LIMITS, same_curves=not why, faults=why)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="of pretraining")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tiny", action="store_true", help="seconds on a CPU, to see that it runs")
    parser.add_argument("--out", default=str(rows.RESULTS / "convergence.jsonl"))
    parser.add_argument("--judge", action="store_true")
    args = parser.parse_args()
    if args.judge:
        return judge(args.out)
    device = "cuda" if torch.cuda.is_available() and not args.tiny else "cpu"
    recipe = TINY if args.tiny else RECIPE
    began = time.monotonic()

    def say(text: str) -> None:
        sys.stdout.write(f"{time.monotonic() - began:5.0f} s  {text}\n")
        sys.stdout.flush()

    training, _, tokenizer = tokenize(recipe)
    examples = Examples.of(sources(recipe)[1], tokenizer, recipe.length)
    say(f"{len(training) / 1e6:.1f} M tokens to pretrain on, {examples.ids.numel() / 1e6:.2f} M to tune on")
    model, pretrained = trained(recipe, training, args.seconds, device)
    say(f"pretrained {pretrained} steps")
    base, config = {name: value.clone() for name, value in model.state_dict().items()}, model.config
    writer = rows.Writer(args.out, workload="convergence", size="tiny" if args.tiny else "small", pretrained_steps=pretrained,
                         parameters=sum(p.numel() for p in model.parameters()), steps=args.steps,
                         tokens=args.batch * recipe.length)  # fmt: skip
    del model
    curves: dict[str, dict[int, Curve]] = {"hf": {}, "fxfuse": {}}
    for contender, seeds in (("hf", EAGER_SEEDS), ("fxfuse", FUSED_SEEDS)):
        for seed in seeds:
            gc.collect()
            model, fused = adapted(base, copy.deepcopy(config), seed, device), {}
            if contender == "fxfuse":
                import fxfuse

                fxfuse.optimize(model)
            losses, times = tune(model, examples.batches(args.batch, seed, device), args.steps, device)
            if contender == "fxfuse":
                report = fxfuse.report(model)
                fused = {rule: report.count(rule) for rule in sorted({s.rule for s in report.sites if s.status == "fused"})}
            curves[contender][seed] = losses
            end = statistics.fmean(losses[-args.steps // 3 :])
            writer.write(kind="run", contender=contender, seed=seed, loss0=losses[0], end=round(end, 5), fused=fused,
                         ms=round(statistics.median(times), 2), losses=[round(loss, 5) for loss in losses])  # fmt: skip
            say(f"{contender} seed {seed}: {losses[0]:.4f} -> {end:.4f}, {statistics.median(times):.1f} ms a step")
    verdict = judged(curves["hf"], curves["fxfuse"], window=max(2, args.steps // 15))
    told = verdict_row(verdict)
    why = told["faults"]
    writer.write(**told)
    say(f"{verdict}; {'; '.join(why) or 'the same curves'}")
    return 1 if why else 0


if __name__ == "__main__":
    sys.exit(main())
