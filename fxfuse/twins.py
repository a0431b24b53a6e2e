"""A causal language model and its fused twin, compared on random tokens: time and bytes, or loss and gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

import fxfuse
from fxfuse.training import TWICE, Run, train
from fxfuse.validation import error_ratio

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fxfuse.reporting.records import Report

SEED = 0
LARGEST_RATIO = 2.0


@dataclass
class Timing:
    """The same training steps, eager and fused."""

    eager: Run
    fused: Run
    report: Report


@dataclass
class Comparison:
    """Error ratios of the loss and of every gradient: 1 is as near to twice the precision as eager is."""

    ratios: dict[str, float]
    report: Report

    @property
    def passed(self) -> bool:
        """No error in the report, and nothing much further from the exact result than eager is."""
        return not self.report.errors and max(self.ratios.values()) <= LARGEST_RATIO

    @property
    def worst(self) -> list[tuple[str, float]]:
        """The names with the largest ratios, largest first."""
        return sorted(self.ratios.items(), key=lambda item: -item[1])[:5]


def random_tokens(model: PreTrainedModel, rows: int, length: int) -> torch.Tensor:
    """Token ids, int64 [rows, length], the same every time."""
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(SEED))


def timed(model: PreTrainedModel, rows: int, length: int, steps: int) -> Timing:
    """Train ``model``'s copy eager, then ``model`` fused, on the same tokens."""
    model.config.use_cache = False
    batches = [random_tokens(model, rows, length)] * steps
    eager = train(copy.deepcopy(model), batches, learning_rate=1e-5)
    fused = train(fxfuse.optimize(model), batches, learning_rate=1e-5)
    return Timing(eager, fused, fxfuse.report(model))


def compared(model: PreTrainedModel, rows: int, length: int) -> Comparison:
    """One forward and backward of ``model`` eager, fused, and in twice the precision."""
    model.config.use_cache = False
    ids = random_tokens(model, rows, length).to(model.device)
    exact = dict(_loss_and_gradients(copy.deepcopy(model).to(TWICE[model.dtype]), ids))
    eager = dict(_loss_and_gradients(copy.deepcopy(model), ids))
    fused = dict(_loss_and_gradients(fxfuse.optimize(model, validate="full"), ids))
    ratios = {name: error_ratio(fused[name], eager[name], exact[name]) for name in exact}
    return Comparison(ratios, fxfuse.report(model))


def _loss_and_gradients(model: PreTrainedModel, ids: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    torch.manual_seed(SEED)
    model.train()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    yield "loss", loss.detach()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            yield name, parameter.grad
