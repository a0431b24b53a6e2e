"""``fxfuse demo``: eager and fused twins trained on real text, and everything fxfuse claims shown on them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

import fxfuse
from fxfuse.demo.agreement import Verdict, agreement
from fxfuse.demo.corpus import VOCABULARY, batches, text, tokens_of
from fxfuse.reporting.text import quantity
from fxfuse.training import TWICE, Run, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fxfuse.reporting.records import Report

SEED = 0


@dataclass(frozen=True)
class Scale:
    """How much is trained."""

    steps: int
    rows: int = 4
    length: int = 128
    learning_rate: float = 1e-3


@dataclass
class Twins:
    """One model trained three times: as it is, fused, and as it is in twice the precision."""

    name: str
    parameters: int
    eager: Run
    fused: Run
    exact: Run
    report: Report
    loss: Verdict
    gradient: Verdict

    @property
    def agree(self) -> bool:
        """The same losses and the same gradients, as far as rounding lets anybody say."""
        return self.loss.agrees and self.gradient.agrees


def run(console: Console, model: str | None = None, steps: int = 32) -> bool:
    """The whole demo; True when every pair of curves agrees and no site went wrong."""
    started = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    written = text()
    tokens = tokens_of(written)
    console.print(
        f"fxfuse {fxfuse.__version__} on {_device_name(device)}, {str(dtype).removeprefix('torch.')}. "
        f"Text: Python's own reference, {len(written):,} characters, {len(tokens):,} tokens.\n",
        highlight=False,
    )
    scale = Scale(steps) if model is None else Scale(steps, learning_rate=1e-5)
    everything = True
    for name, build in _models(model, dtype):
        twins = train_twins(console, name, build, tokens, device, scale)
        show(console, twins)
        everything &= twins.agree and not twins.report.errors and bool(_fused(twins.report))
    show_derivation(console)
    console.print(f"{time.perf_counter() - started:.0f} s in all.", highlight=False)
    return everything


def _models(named: str | None, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], PreTrainedModel]]]:
    """What is trained: the model the user named, or two small ones of the two commonest designs."""
    if named is not None:
        from fxfuse.model_source import model_of

        yield named, lambda: model_of(named, dtype)
        return
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

    size: dict[str, Any] = dict(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
    )
    configs = [LlamaConfig(**size), Qwen3Config(**size, head_dim=32, tie_word_embeddings=True)]
    for config in configs:
        yield config.model_type, partial(AutoModelForCausalLM.from_config, config, dtype=dtype)


def train_twins(
    console: Console,
    name: str,
    build: Callable[[], PreTrainedModel],
    tokens: torch.Tensor,
    device: torch.device,
    scale: Scale,
) -> Twins:
    """Train the eager model, its fused twin and the exact one from the same weights on the same batches."""
    torch.manual_seed(SEED)
    original = build()
    original.config.use_cache = False
    vocabulary = original.config.get_text_config().vocab_size
    drawn = list(batches(tokens % vocabulary, scale.steps, scale.rows, scale.length, SEED))
    parameters = sum(p.numel() for p in original.parameters())
    with _progress(console, f"training {name}", 3 * scale.steps) as tick:

        def trained(model: PreTrainedModel) -> Run:
            torch.manual_seed(SEED)
            return train(model, drawn, scale.learning_rate, tick)

        eager = trained(copy.deepcopy(original).to(device))
        exact = trained(copy.deepcopy(original).to(device, TWICE[original.dtype]))
        model = fxfuse.optimize(original.to(device))
        fused = trained(model)
    eps = torch.finfo(model.dtype).eps
    loss = agreement(eager.losses, fused.losses, exact.losses, eps)
    gradient = agreement(eager.gradient_norms, fused.gradient_norms, exact.gradient_norms, eps)
    return Twins(name, parameters, eager, fused, exact, fxfuse.report(model), loss, gradient)


def show(console: Console, twins: Twins) -> None:
    """The report, the curves, the bytes and the time of one pair of twins."""
    console.rule(Text(f"{twins.name}, {twins.parameters / 1e6:.1f} M parameters"), align="left")
    console.print(Text(str(twins.report)))
    console.print()
    console.print(_curves(twins))
    console.print(Text(f"loss: {twins.loss.sentence}"))
    console.print(Text(f"gradient norm: {twins.gradient.sentence}"))
    console.print(
        f"saved for the backward: eager {quantity(twins.eager.saved_bytes)}, "
        f"fused {quantity(twins.fused.saved_bytes)}",
        highlight=False,
    )
    console.print(
        f"step: eager {1e3 * twins.eager.step:.1f} ms, fused {1e3 * twins.fused.step:.1f} ms "
        f"(first fused step, which captures, derives and validates: {twins.fused.first_step:.1f} s)\n",
        highlight=False,
    )


def _curves(twins: Twins) -> Table:
    """A few points of both loss curves."""
    count = len(twins.eager.losses)
    steps = sorted({round(i * (count - 1) / 7) for i in range(8)})
    grid = Table(box=None, pad_edge=False, header_style="")
    grid.add_column("step")
    for step in steps:
        grid.add_column(str(step + 1), justify="right")
    for name, curve in (("eager", twins.eager), ("fused", twins.fused)):
        grid.add_row(name, *(f"{curve.losses[step]:.5f}" for step in steps))
    return grid


def show_derivation(console: Console) -> None:
    """One backward as mathematics: what fxfuse derived, and nobody wrote."""

    def rms_norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w

    console.rule("a derived backward: y = x * rsqrt(mean(x^2) + eps) * w", align="left")
    console.print(Text(str(fxfuse.derive(rms_norm, torch.randn(4, 8), torch.randn(8)))))
    console.print()


def _fused(report: Report) -> int:
    return sum(site.count for site in report.sites if site.status == "fused")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the CPU, {torch.get_num_threads()} threads"


@contextmanager
def _progress(console: Console, what: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar for a person who watches; nothing in a log."""
    if not console.is_terminal:
        yield lambda: None
        return
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)
