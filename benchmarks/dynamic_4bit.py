"""Dynamic 4-bit on a model that was really trained: held-out loss of fxfuse.quantize's choice against others of the same size.

    python benchmarks/dynamic_4bit.py [--seconds 60] [--recipe plain|outliers|planted|small|narrow] [--out FILE] [--tiny]

The model: a llama of some 50 million parameters, trained here for ``--seconds`` on Python sources (small_model.py). ``planted``: the
same, then in 3 of its 14 layers some channels are made large in one weight and small in the one before, which leaves the function as it
was. ``outliers``: three times the learning rate and no weight decay, after which few channels are much larger than others. ``small``: a
sixth of the parameters, trained on many more tokens for each, which has less to spare; ``narrow``: half as wide again. Then, from the
same weights: 16 bits, NF4 throughout, and at each budget the linears that ``fxfuse.quantize`` keeps, random ones (three draws), the
first, the last. For each the held-out loss and the divergence from 16 bits on held-out text. (After a training that is too short
the loss says nothing: what rounding does to it is then mostly a step along or against a gradient that is still there, and may even
make it smaller.)
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import random
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not benchmarks/: this folder's names are also packages
    importlib.import_module("benchmarks")
    del sys.path[0]  # its folder `kernels` would pass for the package of that name, which bitsandbytes tries
    if importlib.util.find_spec("fxfuse") is None:
        sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import fxfuse  # noqa: E402
from benchmarks import rows  # noqa: E402
from benchmarks.small_model import Recipe, batches, tokenize, trained  # noqa: E402

BUDGETS = (0.05, 0.1, 0.2, 0.4, 0.8)
RECIPES = {
    "plain": Recipe(),
    "outliers": Recipe(rate=3e-3, decay=0.0),
    "small": Recipe(hidden=256, layers=6, batch=128, rate=2e-3),
    "planted": Recipe(planted=3),
    "narrow": Recipe(hidden=128, layers=8, batch=128, rate=4e-3, decay=0.0),
}
TINY = Recipe(hidden=64, layers=2, vocabulary=512, batch=4, length=64, characters=300_000, planted=1)


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
    from fxfuse.quantization.sensitivity import divergence, predict

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    linears = find_linears(model, config)
    whole = loss_on(model, held_out)
    few = [{"input_ids": ids[:16]} for ids in held_out[:2]]
    predictions = predict(model, few)

    def row(contender: str, kept: list[str] | None, budget: float | None, loss: float | None = None, **more: Any) -> None:
        going = [each for each in linears if kept is None or each.name not in kept]
        if loss is None:
            with as_quantized(going, config):
                loss = loss_on(model, held_out)
            more["divergence"] = divergence(model, going, few, config, predictions)
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
        row("fxfuse", selection.kept, budget, seconds=seconds, extra_bytes=spent, as_stored=round(loss_on(quantized, held_out), 5))
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
    parser.add_argument("--seconds", type=float, default=60, help="of training")
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="plain")
    parser.add_argument("--out", default=str(rows.RESULTS / "dynamic_4bit.jsonl"))
    parser.add_argument("--tiny", action="store_true", help="seconds on a CPU, to see that it runs")
    args = parser.parse_args()
    recipe = TINY if args.tiny else RECIPES[args.recipe]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    start = time.monotonic()
    training, held_out, _ = tokenize(recipe)
    print(f"{len(training) / 1e6:.1f} M tokens, {len(held_out) / 1e6:.2f} M held out, {time.monotonic() - start:.0f} s", flush=True)
    model, steps = trained(recipe, training, args.seconds, device)
    print(f"{steps} steps, {time.monotonic() - start:.0f} s", flush=True)
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
