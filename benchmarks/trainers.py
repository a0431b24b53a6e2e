"""TRL's trainers as people call them: fxfuse against plain TRL, TRL with Liger-Kernel, and Unsloth.

    python benchmarks/trainers.py --suite sft:trl,sft:unsloth,sft:fxfuse,dpo:trl,dpo:fxfuse
    python benchmarks/trainers.py --suite sft:trl,sft:fxfuse,dpo:trl,dpo:fxfuse --tiny        # on a CPU

sft   SFTTrainer on W1: Qwen2.5-7B QLoRA r16, packed to b2 s4096, checkpointed (TRL's default), bf16
dpo   DPOTrainer: Llama-3.1-8B LoRA r16, 2 pairs of 2 x 1024 tokens, checkpointed, the adapters' base as reference


Every job is a process of its own: same random weights, same texts, TRL's own settings. A step is from the trainer's
`on_step_begin` to the next one (data, forward, backward, clipping, optimizer, logging); the first steps compile and are
not counted. Needs trl and datasets; on the GPU machine they lie beside Unsloth (`$UNSLOTH_SITE`, see gpu_run.sh).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    importlib.import_module("benchmarks")
    del sys.path[0]  # its folder `kernels` would pass for the package of that name, which bitsandbytes tries
    if "--job" in sys.argv and ":unsloth" in sys.argv[sys.argv.index("--job") + 1]:
        importlib.import_module("unsloth")  # before trl, transformers and peft: it changes them

from benchmarks import rows  # noqa: E402
from benchmarks.jobs import OFFLINE  # noqa: E402

TASKS = ("sft", "dpo")
CONTENDERS = ("trl", "liger", "unsloth", "fxfuse")
GIB = 2**30


def workload_of(task: str, args: argparse.Namespace) -> Any:
    """The model, batch and length of a task; the preference pairs are two batches of half the length."""
    from benchmarks.workloads import named

    workload = named("W1") if task == "sft" else replace(named("W2"), length=2048)
    workload = replace(workload, layers=args.layers, tiny=args.tiny)
    if args.tiny:
        workload = replace(workload, length=64, layers=args.layers or 2)
    return replace(workload, length=args.length) if args.length else workload


def texts_of(task: str, workload: Any, steps: int) -> tuple[Any, Any]:
    """(dataset, tokenizer): rows of about the wanted length, of words of one token each."""
    import random

    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "<pad>", *(f"w{i}" for i in range(min(50000, workload.config["vocab_size"] - 4)))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    rng = random.Random(0)

    def text(count: int) -> str:
        return " ".join(rng.choices(words[4:], k=count))

    rows_wanted = workload.batch * (steps + 4)
    if task == "dpo":  # prompt and completion make half a length together: chosen and rejected are scored at once
        quarter = workload.length // 4
        columns = ("prompt", "chosen", "rejected")
        data = [{name: text(quarter - (name != "prompt")) for name in columns} for _ in range(rows_wanted)]
    else:  # shorter than a pack, so that packing has something to do
        data = [{"text": text(rng.randint(workload.length // 8, workload.length))} for _ in range(2 * rows_wanted)]
    return Dataset.from_list(data), PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks)


def model_of(contender: str, workload: Any, device: str, scratch: Path) -> Any:
    """The model with adapters, as the contender's own guide makes it."""

    from benchmarks import peers

    if contender == "unsloth":
        return peers._unsloth(workload, device, scratch, "").model
    model = peers.with_adapters(peers.build_base(workload, device), workload)
    peers.draw_adapters(model)
    if contender.startswith("fxfuse"):
        import fxfuse

        return fxfuse.optimize(model)
    return model


def trainer_of(task: str, contender: str, model: Any, workload: Any, args: argparse.Namespace, scratch: Path, callback: Any) -> Any:
    import trl

    cpu = args.tiny
    settings: dict[str, Any] = dict(
        output_dir=str(scratch / "out"), max_steps=args.warmup + args.steps, per_device_train_batch_size=workload.batch,
        gradient_accumulation_steps=1,  # (Unsloth's default is 2)
        learning_rate=1e-5, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, bf16=True, use_cpu=cpu, seed=0,
        optim="adamw_torch" if cpu else "adamw_torch_fused", use_liger_kernel=contender == "liger", dataloader_pin_memory=not cpu,
    )  # fmt: skip
    data, tokenizer = texts_of(task, workload, args.warmup + args.steps)
    given = dict(train_dataset=data, processing_class=tokenizer, callbacks=[callback])
    if task == "dpo":
        return trl.DPOTrainer(model, args=trl.DPOConfig(max_length=workload.length // 2, **settings), **given)
    packed = dict(packing=True, packing_strategy="wrapped", max_length=workload.length, dataset_text_field="text")
    return trl.SFTTrainer(model, args=trl.SFTConfig(**packed, **settings), **given)


def clock_of(warmup: int) -> Any:
    """A callback that notes when steps begin and what memory the counted ones need."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.begun: list[float] = []
            self.started = time.perf_counter()

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                if len(self.begun) == warmup:
                    torch.cuda.reset_peak_memory_stats()
            self.begun.append(time.perf_counter())

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.begun.append(time.perf_counter())

    return Clock()


def work(args: argparse.Namespace) -> None:
    """One job: a row."""
    import torch

    task, contender = args.job.split(":")
    device = "cuda" if torch.cuda.is_available() and not args.tiny else "cpu"
    workload, scratch = workload_of(task, args), Path(args.scratch)
    model = model_of(contender, workload, device, scratch)
    clock = clock_of(args.warmup)
    trainer = trainer_of(task, contender, model, workload, args, scratch, clock)
    trainer.train()
    laps = [1e3 * (b - a) for a, b in zip(clock.begun, clock.begun[1:], strict=False)]
    log = [row for row in trainer.state.log_history if "loss" in row]
    counted = sorted(laps[args.warmup :])
    median = statistics.median(counted)
    found: dict[str, Any] = dict(
        ms=median, ms_min=counted[0], ms_max=counted[-1], accumulated=trainer.args.gradient_accumulation_steps,
        tokens_s=1e3 * workload.tokens * trainer.args.gradient_accumulation_steps / median,
        first_step_s=laps[0] / 1e3, loss0=log[0]["loss"], losses=[row["loss"] for row in log], grad_norm=log[0].get("grad_norm"),
    )  # fmt: skip
    if device == "cuda":
        found |= dict(peak_gib=torch.cuda.max_memory_allocated() / GIB, reserved_gib=torch.cuda.max_memory_reserved() / GIB)
    if contender.startswith("fxfuse"):
        from benchmarks.step_worker import fused_by

        found |= fused_by(trainer.model)
    rows.Writer(args.out).write(kind="trainer", workload=task, contender=contender, setup=workload.describe(), **found)


def run(job: str, args: argparse.Namespace, scratch: Path, limit: float) -> str:
    """Run one job in a process of its own; what went wrong, or nothing."""
    environment = {**os.environ, **OFFLINE, "TRL_EXPERIMENTAL_SILENCE": "1"}
    sites = [environment.get("PYTHONPATH", ""), environment.get("UNSLOTH_SITE", "")]
    environment["PYTHONPATH"] = os.pathsep.join(site for site in sites if site)
    environment.setdefault("CUDA_VISIBLE_DEVICES", "0")  # of several, a trainer would put its model on all
    environment["UNSLOTH_COMPILE_LOCATION"] = str(scratch / "unsloth_cache")
    command = [sys.executable, str(Path(__file__).resolve()), "--job", job, "--scratch", str(scratch), "--out", args.out]
    for name in ("warmup", "steps", "layers", "length"):
        command += [f"--{name}", str(getattr(args, name))]
    command += ["--tiny"] if args.tiny else []
    log = Path(args.logs or scratch) / f"trainer_{job.replace(':', '_')}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        try:
            done = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=limit)
        except subprocess.TimeoutExpired:
            return f"over its {limit:.0f} s"
    lines = log.read_text(errors="replace").strip().splitlines() or [""]
    return f"ended with {done.returncode}: {lines[-1][:300]}" if done.returncode else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="sft:trl,sft:unsloth,sft:fxfuse,sft:liger,dpo:trl,dpo:fxfuse,dpo:liger,dpo:unsloth")
    parser.add_argument("--out", default=str(rows.RESULTS / "trainers.jsonl"))
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--layers", type=int, default=0, help="cut every model to this many layers")
    parser.add_argument("--length", type=int, default=0, help="another sequence length")
    parser.add_argument("--tiny", action="store_true", help="the same structures at widths a CPU can train")
    parser.add_argument("--limit", type=float, default=150, help="seconds a job")
    parser.add_argument("--deadline", type=float, default=560, help="seconds for all")
    parser.add_argument("--logs", default="", help="folder for the jobs' output")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        work(args)
        return 0
    jobs = [job for job in args.suite.split(",") if job]
    for job in jobs:
        task, _, contender = job.partition(":")
        if task not in TASKS or contender not in CONTENDERS:
            parser.error(f"{job!r} is no job: TASK:CONTENDER of {', '.join(TASKS)} and {', '.join(CONTENDERS)}")
    begun, failures = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="trainers-", ignore_cleanup_errors=True) as scratch:
        for job in jobs:
            left = args.deadline - (time.monotonic() - begun)
            failed = "not run: the deadline" if left < 30 else run(job, args, Path(scratch), min(args.limit, left))
            if failed:
                failures += 1
                task, contender = job.split(":")
                rows.Writer(args.out, gpu="").write(kind="trainer", workload=task, contender=contender, failed=failed)
            say(f"[{time.monotonic() - begun:6.1f}] {job} {failed}")
    say(summary(rows.read(args.out)))
    return 1 if failures else 0


def summary(found: list[dict[str, Any]]) -> str:
    """The last run's rows, beside plain TRL's."""
    latest = [row for row in found if row["run"] == os.environ.get("RUN")] or found[-8:]
    plain = {row["workload"]: row["ms"] for row in latest if row["contender"] == "trl" and "ms" in row}
    lines = []
    for row in latest:
        if "ms" not in row:
            continue
        times = plain.get(row["workload"], row["ms"]) / row["ms"]
        lines.append(
            f"{row['workload']:4} {row['contender']:8} {row['ms']:9.1f} ms  {row['tokens_s']:9.0f} tokens/s  {times:5.2f} x TRL  "
            f"{row.get('peak_gib', 0):6.2f} GiB  loss {row['loss0']:.4f}  fused {json.dumps(row.get('fused', {}))}"
        )
    return "\n".join(lines)


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
