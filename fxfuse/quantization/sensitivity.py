"""What rounding one linear to 4 bits does: to its weight, to its output, to the predictions.

    weight error       |E|^2 / |W|^2                       E = Q(W) - W
    activation error   sum |E x|^2 / sum |W x|^2           over the calibration's tokens
    divergence         mean KL(p || p_E)                   p: predictions of the model, p_E: with this linear alone rounded

The divergence is what decides: it is the expected gain in loss on text that the model itself would write, up to what a second-order
expansion neglects, and needs no labels. The two others are cheap, are shown beside it, and say why: a weight with outliers has
a large weight error, a weight that outlying inputs meet a large activation error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .linears import Linear, as_quantized, rounded
from .progress import with_progress

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

Batch = Mapping[str, Tensor]
_TOKENS = 4096  # positions whose predictions are compared; their logits are kept


@dataclass(frozen=True)
class Sensitivity:
    """weight_error, activation_error: relative squares; divergence: nats a token."""

    weight_error: float
    activation_error: float
    divergence: float


@dataclass(frozen=True)
class Predictions:
    """Logits of chosen positions of each batch, and which they are."""

    positions: list[Tensor]
    logits: list[Tensor]


def measure(model: PreTrainedModel, linears: Sequence[Linear], batches: Sequence[Batch], config: BitsAndBytesConfig,
            predictions: Predictions) -> dict[str, Sensitivity]:  # fmt: skip
    """Each linear's sensitivity. One pass over ``batches`` for each, and one over the first for all activation errors."""
    activation = _activation_errors(model, linears, batches[0], config)
    measured = {}
    for linear in with_progress(linears, "measuring linears"):
        error = rounded(linear, config).float() - linear.matrix().float()
        weight_error = float(error.square().sum() / linear.matrix().float().square().sum().clamp_min(1e-30))
        measured[linear.name] = Sensitivity(weight_error, activation[linear.name],
                                            divergence(model, [linear], batches, config, predictions))
    return measured


def predict(model: PreTrainedModel, batches: Sequence[Batch]) -> Predictions:
    """The model's own predictions at up to 4096 positions, spread evenly; padding is left out."""
    kept = [_real_positions(batch) for batch in batches]
    share = max(1, -(-sum(len(positions) for positions in kept) // _TOKENS))
    positions = [each[::share] for each in kept]
    return Predictions(positions, [_logits(model, batch, where) for batch, where in zip(batches, positions, strict=True)])


def divergence(model: PreTrainedModel, linears: Sequence[Linear], batches: Sequence[Batch], config: BitsAndBytesConfig,
               predictions: Predictions) -> float:  # fmt: skip
    """Mean KL divergence in nats a token from the model's predictions to those with ``linears`` rounded."""
    total, count = 0.0, 0
    with as_quantized(linears, config):
        for batch, where, before in zip(batches, predictions.positions, predictions.logits, strict=True):
            reference = before.float().log_softmax(-1)
            now = _logits(model, batch, where).float().log_softmax(-1)
            total += float((reference.exp() * (reference - now)).sum())
            count += len(where)
    return max(0.0, total / max(1, count))


def _activation_errors(model: PreTrainedModel, linears: Sequence[Linear], batch: Batch, config: BitsAndBytesConfig) -> dict[str, float]:
    sums = {linear.name: torch.zeros(2, dtype=torch.float64) for linear in linears}

    def compare(linear: Linear, inputs: tuple[Any, ...]) -> None:
        x = inputs[0].detach().flatten(0, -2).float()
        matrix = linear.matrix().float()
        wrong = x @ (rounded(linear, config).float() - matrix).T
        right = x @ matrix.T
        sums[linear.name] += torch.stack([wrong.square().sum(), right.square().sum()]).double().cpu()

    with _hooks(linears, compare), torch.no_grad():
        model(**_inputs(batch))
    return {name: float(wrong / right) if right > 0 else 0.0 for name, (wrong, right) in sums.items()}


@contextmanager
def _hooks(linears: Sequence[Linear], look: Any) -> Iterator[None]:
    def hook(linear: Linear) -> Any:
        def run(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and isinstance(inputs[0], Tensor) and inputs[0].numel():
                look(linear, inputs)

        return run

    handles = [linear.module.register_forward_pre_hook(hook(linear)) for linear in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _real_positions(batch: Batch) -> Tensor:
    """Flat indices of the positions that are no padding."""
    shape = batch["input_ids"].shape
    mask = batch.get("attention_mask")
    if mask is None or mask.shape != shape:
        return torch.arange(shape.numel(), device=batch["input_ids"].device)
    return mask.flatten().nonzero().flatten()


def _inputs(batch: Batch) -> dict[str, Any]:
    """Without labels, which would make the model compute a loss that nobody reads."""
    return {name: value for name, value in batch.items() if name != "labels"} | {"use_cache": False}


def _logits(model: PreTrainedModel, batch: Batch, where: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**_inputs(batch)).logits.flatten(0, -2)[where]
