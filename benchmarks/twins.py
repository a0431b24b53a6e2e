"""Fused twin of a Llama of 1.2 billion parameters against eager: 200 training steps, the same loss curve?

    python benchmarks/twins.py [--steps 200] [--tiny] [--out FILE]

Three runs from the same weights on the same text in the same order: eager, fused, and eager with the rows of each
batch in another order. The last is the same mathematics with other roundings, so what separates it from eager is
the noise that the fused run's difference is to be measured against. The text is Python's own standard library,
tokenized by a byte-pair encoding trained on it. `--tiny` is the same on a CPU with a model of a few million.
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

import torch  # noqa: E402

from benchmarks import rows  # noqa: E402

log = logging.getLogger("benchmarks")
LLAMA_1B = dict(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=4096,
    rope_theta=500000.0,
    tie_word_embeddings=True,
)
LLAMA_TINY = dict(
    vocab_size=2048,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=512,
    tie_word_embeddings=True,
)


@dataclass(frozen=True)
class Plan:
    config: dict[str, Any]
    steps: int
    batch: int
    length: int
    rate: float
    warmup: int
    dtype: torch.dtype
    device: str
    vocabulary: int


@dataclass
class Curve:
    """What one run gave."""

    losses: list[float] = field(default_factory=list)
    step_ms: float = 0.0
    first_step_s: float = 0.0
    peak_gib: float = 0.0
    fused: dict[str, int] = field(default_factory=dict)


def standard_library_text(least: int) -> str:
    """Source files of the standard library, in name order, until `least` characters."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    parts, size = [], 0
    for path in sorted(folder.glob("*.py")) + sorted(folder.glob("*/*.py")):
        if "site-packages" in path.parts or "test" in path.parts:
            continue
        text = path.read_text(errors="ignore")
        parts.append(text)
        size += len(text)
        if size >= least:
            break
    return "\n".join(parts)


def tokens(plan: Plan) -> torch.Tensor:
    """int64 [steps, batch, length]: the text, tokenized, read without overlap and started again where it ends."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    text = standard_library_text(12_000_000 if plan.device == "cuda" else 400_000)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=plan.vocabulary, initial_alphabet=alphabet, show_progress=False)
    chunks = [text[i : i + 20_000] for i in range(0, len(text), 20_000)]
    tokenizer.train_from_iterator(chunks[:200], trainer)
    ids = torch.tensor([i for encoding in tokenizer.encode_batch(chunks) for i in encoding.ids])
    needed = plan.steps * plan.batch * plan.length
    ids = (
        ids.repeat(-(-needed // len(ids)))[:needed].view(plan.batch, plan.steps, plan.length).transpose(0, 1)
    )
    return ids.contiguous()


def model_for(plan: Plan) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(plan.device):
        model = LlamaForCausalLM(LlamaConfig(**plan.config, use_cache=False, bos_token_id=0, eos_token_id=0))
    return model.to(plan.dtype).train()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def train(plan: Plan, ids: torch.Tensor, fuse: bool, swap_rows: bool) -> Curve:
    """One run: AdamW with a linear warmup, gradients clipped at 1, losses read once at the end."""
    model, curve = model_for(plan), Curve()
    if fuse:
        import fxfuse

        fxfuse.optimize(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.rate, betas=(0.9, 0.95), weight_decay=0.1, fused=plan.device == "cuda"
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, (n + 1) / plan.warmup))
    batches = (ids.flip(1) if swap_rows else ids).to(plan.device)
    losses, times = [], []
    if plan.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for batch in batches:
        synchronize(plan.device)
        start = time.perf_counter()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize(plan.device)
        times.append(time.perf_counter() - start)
        losses.append(loss.detach().float())
    curve.losses = torch.stack(losses).tolist()
    curve.first_step_s, curve.step_ms = times[0], statistics.median(times[len(times) // 4 :]) * 1e3
    if plan.device == "cuda":
        curve.peak_gib = torch.cuda.max_memory_allocated() / 2**30
    if fuse:
        import fxfuse

        for site in fxfuse.report(model).sites:
            if site.status == "fused":
                curve.fused[site.rule] = curve.fused.get(site.rule, 0) + site.count
    return curve


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def gap(a: list[float], b: list[float]) -> dict[str, float]:
    """How two loss curves differ, in nats."""
    apart = [abs(x - y) for x, y in zip(a, b, strict=True)]
    tail = max(1, len(a) // 10)
    return dict(
        max=max(apart),
        mean=statistics.fmean(apart),
        mean_last_tenth=statistics.fmean(apart[-tail:]),
        signed_mean=statistics.fmean(x - y for x, y in zip(a, b, strict=True)),
    )


def verdict(fused: dict[str, float], noise: dict[str, float], first: float) -> list[str]:
    """Why the curves are not the same; empty when they are."""
    faults = []
    if not first <= 1e-3:
        faults.append(f"first losses differ by {first:.2e}")
    if not fused["mean"] <= 2 * noise["mean"] + 1e-4:
        faults.append(
            f"mean difference {fused['mean']:.2e} against the noise of eager itself {noise['mean']:.2e}"
        )
    if not fused["max"] <= 3 * noise["max"] + 1e-3:
        faults.append(f"largest difference {fused['max']:.2e} against {noise['max']:.2e}")
    return faults


def main() -> int:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(message)s")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--tiny", action="store_true", help="a small model in float32 on the CPU")
    parser.add_argument("--runs", default="eager,fused,noise", help="which of the three runs")
    parser.add_argument("--out", default=str(rows.RESULTS / "twins.jsonl"))
    args = parser.parse_args()
    if args.tiny or not torch.cuda.is_available():
        torch.set_num_threads(1)
        plan = Plan(LLAMA_TINY, args.steps or 12, 2, 64, 1e-3, 4, torch.float32, "cpu", 2048)
    else:
        plan = Plan(
            LLAMA_1B, args.steps or 200, args.batch, args.length, 3e-4, 20, torch.bfloat16, "cuda", 32768
        )
    start = time.perf_counter()
    ids = tokens(plan)
    log.warning(
        "%s tokens, up to id %d, %.0f s", f"{ids.numel():,}", int(ids.max()), time.perf_counter() - start
    )
    out, curves = rows.Writer(args.out), {}
    size = "1B" if plan.device == "cuda" else "tiny"
    workload = f"llama {size} b{plan.batch} s{plan.length} {str(plan.dtype)[6:]}, {plan.steps} steps"
    for name, settings in dict(eager=(False, False), fused=(True, False), noise=(False, True)).items():
        if name not in args.runs.split(","):
            continue
        curve = curves[name] = train(plan, ids, *settings)
        release()
        out.write(
            kind="run",
            workload=workload,
            contender={"fused": "fxfuse", "eager": "hf", "noise": "hf, rows swapped"}[name],
            ms=round(curve.step_ms, 2),
            tokens_s=round(plan.batch * plan.length / curve.step_ms * 1e3),
            peak_gib=round(curve.peak_gib, 3),
            first_step_s=round(curve.first_step_s, 2),
            loss0=curve.losses[0],
            loss_end=statistics.fmean(curve.losses[-10:]),
            fused=curve.fused,
            losses=[round(x, 5) for x in curve.losses],
        )
        log.warning(
            "%s: loss %.4f -> %.4f, %.1f ms a step, first %.1f s, %.2f GiB",
            name,
            curve.losses[0],
            statistics.fmean(curve.losses[-10:]),
            curve.step_ms,
            curve.first_step_s,
            curve.peak_gib,
        )
    if len(curves) < 3:
        return 0
    fused, noise = (gap(curves[n].losses, curves["eager"].losses) for n in ("fused", "noise"))
    faults = verdict(fused, noise, abs(curves["fused"].losses[0] - curves["eager"].losses[0]))
    out.write(
        kind="verdict",
        workload=workload,
        same_curve=not faults,
        faults=faults,
        **{f"fused_{k}": v for k, v in fused.items()},
        **{f"noise_{k}": v for k, v in noise.items()},
        speedup=round(curves["eager"].step_ms / curves["fused"].step_ms, 3),
    )
    log.warning(
        "fused - eager: max %.2e mean %.2e; eager's own noise: max %.2e mean %.2e; %s",
        fused["max"],
        fused["mean"],
        noise["max"],
        noise["mean"],
        "; ".join(faults) or "the same curve",
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
