"""Dynamic 4-bit on a model that was really trained: held-out loss of fxfuse.quantize's choice against others of the same size.

    python benchmarks/dynamic_4bit.py [--seconds 90] [--recipe plain|outliers] [--out FILE] [--tiny]

The model: a llama of some 110 million parameters, trained here for ``--seconds`` on Python sources (the standard library and the
installed packages; one file in twenty is held out), 16384 tokens of a BPE trained on a part of them. ``outliers``: three times
the learning rate and no weight decay, after which few channels are much larger than others. Then, from the same weights: 16 bits,
NF4 throughout, and at each budget the linears that ``fxfuse.quantize`` keeps, random ones (three draws), the first, the last.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not benchmarks/: this folder's names are also packages

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import fxfuse  # noqa: E402
from benchmarks import rows  # noqa: E402

BUDGETS = (0.05, 0.1, 0.2, 0.4)


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how."""

    hidden: int = 768
    layers: int = 12
    vocabulary: int = 16384
    batch: int = 48
    length: int = 512
    rate: float = 1e-3
    decay: float = 0.1
    characters: int = 60_000_000


RECIPES = {"plain": Recipe(), "outliers": Recipe(rate=3e-3, decay=0.0)}
TINY = Recipe(hidden=64, layers=2, vocabulary=512, batch=4, length=64, characters=300_000)


def sources(least: int) -> tuple[list[str], list[str]]:
    """Texts of Python files until there are ``least`` characters: for training, and held out."""
    paths = [Path(sysconfig.get_paths()[key]) for key in ("stdlib", "purelib")]
    files = sorted({file for folder in paths for file in folder.rglob("*.py")}, key=str)
    random.Random(0).shuffle(files)
    kept: tuple[list[str], list[str]] = ([], [])
    size = 0
    for place, file in enumerate(files):
        text = file.read_text(errors="ignore")
        kept[place % 20 == 0].append(text)
        size += len(text)
        if size >= least:
            break
    return kept


def tokenize(recipe: Recipe) -> tuple[Tensor, Tensor]:
    """int64 token streams, for training and held out."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    training, held_out = sources(recipe.characters)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=recipe.vocabulary, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    tokenizer.train_from_iterator(training[: max(8, len(training) // 12)], trainer)

    def stream(texts: list[str]) -> Tensor:
        return torch.tensor([i for encoding in tokenizer.encode_batch(texts) for i in encoding.ids])

    return stream(training), stream(held_out)


def batches(stream: Tensor, recipe: Recipe, seed: int, device: str) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(stream) - recipe.length, (recipe.batch,), generator=generator)
        yield torch.stack([stream[s : s + recipe.length] for s in starts.tolist()]).to(device)


def trained(recipe: Recipe, stream: Tensor, seconds: float, device: str) -> tuple[Any, int]:
    """A model in bfloat16, and the steps it was trained: float32 weights under autocast, warm-up, linear decay by the clock."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = recipe.hidden // 64
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=recipe.vocabulary, hidden_size=recipe.hidden, intermediate_size=recipe.hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=recipe.layers, num_attention_heads=heads, num_key_value_heads=heads, use_cache=False,
    )).to(device).train()  # fmt: skip
    fxfuse.optimize(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, betas=(0.9, 0.95), weight_decay=recipe.decay)
    began, steps = None, 0
    for ids in batches(stream, recipe, 0, device):
        done = 0.0 if began is None else (time.monotonic() - began) / seconds
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * min(1.0, (steps + 1) / 100) * (1 - done)
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        if steps % 100 == 0 and not math.isfinite(loss.item()):
            raise SystemExit(f"the loss is {loss.item()} after {steps} steps: another learning rate")
        began = began or time.monotonic()  # the first step compiles
    return fxfuse.restore(model).to(torch.bfloat16).eval(), steps


@torch.no_grad()
def loss_on(model: Any, held_out: Iterable[Tensor]) -> float:
    """Mean cross-entropy, nats a token."""
    losses = [torch.nn.functional.cross_entropy(model(input_ids=ids).logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
              for ids in held_out]  # fmt: skip
    return float(torch.stack(losses).mean())


def filled(order: list[Any], left: int) -> list[str]:
    """Names of the first linears of an order that fit."""
    names = []
    for row in order:
        if row.extra <= left:
            names.append(row.name)
            left -= row.extra
    return names


def compare(model: Any, calibration: list[Tensor], held_out: list[Tensor], write: Any) -> None:
    """One row for each way of choosing and each budget."""
    from transformers import BitsAndBytesConfig

    from fxfuse.quantization.dynamic import selection_of
    from fxfuse.quantization.linears import as_quantized, find_linears

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    linears = find_linears(model, config)
    whole = loss_on(model, held_out)

    def row(contender: str, kept: list[str] | None, budget: float | None, loss: float | None = None, **more: Any) -> None:
        if loss is None:
            with as_quantized([each for each in linears if kept is None or each.name not in kept], config):
                loss = loss_on(model, held_out)
        write(contender=contender, budget=budget, loss=round(loss, 5), over_16_bits=round(loss / whole - 1, 6),
              kept=len(kept or []), linears=len(linears), **more)  # fmt: skip

    row("16 bits", [each.name for each in linears], None, whole)
    row("nf4", None, None)
    for budget in BUDGETS:
        start = time.monotonic()
        quantized = fxfuse.quantize(copy.deepcopy(model), calibration, budget=budget)
        seconds = round(time.monotonic() - start, 1)
        selection = selection_of(quantized)
        spent = sum(each.extra for each in selection.rows if each.kept)
        row("fxfuse", selection.kept, budget, loss_on(quantized, held_out), seconds=seconds, extra_bytes=spent)
        for seed in range(3):
            order = list(selection.rows)
            random.Random(seed).shuffle(order)
            row(f"random {seed}", filled(order, spent), budget)
        row("first", filled(selection.rows, spent), budget)
        row("last", filled(selection.rows[::-1], spent), budget)
        if budget == 0.1:
            print(selection)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=90, help="of training")
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="plain")
    parser.add_argument("--out", default=str(rows.RESULTS / "dynamic_4bit.jsonl"))
    parser.add_argument("--tiny", action="store_true", help="seconds on a CPU, to see that it runs")
    args = parser.parse_args()
    recipe = TINY if args.tiny else RECIPES[args.recipe]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    training, held_out = tokenize(recipe)
    print(f"{len(training) / 1e6:.1f} M tokens, {len(held_out) / 1e6:.2f} M held out", flush=True)
    model, steps = trained(recipe, training, args.seconds, device)
    writer = rows.Writer(args.out, workload="dynamic_4bit", recipe="tiny" if args.tiny else args.recipe, steps=steps,
                         parameters=sum(p.numel() for p in model.parameters()))  # fmt: skip
    few = batches(training, recipe, 1, device)
    other = batches(held_out, recipe, 2, device)

    def write(**row: Any) -> None:
        writer.write(**row)
        print(row, flush=True)

    compare(model, [next(few)[:8] for _ in range(2)], [next(other) for _ in range(16)], write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
