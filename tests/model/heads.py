"""Tiny causal models whose loss head is judged against float64."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import fxfuse
from fxfuse.validation import LIMITS, error_ratio
from tests.model.builders import VOCABULARY, causal_lm

WITHOUT_DROPOUT = {
    "opt": dict(dropout=0.0, attention_dropout=0.0),
    "bloom": dict(hidden_dropout=0.0, attention_dropout=0.0),
    "gpt_neox": dict(hidden_dropout=0.0, attention_dropout=0.0),
    "phi": dict(resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0),
    "gemma2": dict(head_dim=16),
    "qwen3": dict(head_dim=16),
}
# softcap and a tied head; logits scaled by a product; by a quotient; a bias; a tied head; other norms, positions and layouts
TYPES = ["llama", "gemma2", "cohere", "granite", "phi", "opt", "gpt_neox", "bloom", "qwen3"]


def model_of(kind: str) -> nn.Module:
    return causal_lm(kind, 1, **WITHOUT_DROPOUT.get(kind, {}))


def batch() -> dict[str, Tensor]:
    """Two sequences; a prompt and padding are ignored."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, 11), generator=generator)
    labels = ids.clone()
    labels[0, :4] = -100
    labels[1, -2:] = -100
    return {"input_ids": ids, "labels": labels}


def optimized(model: nn.Module, **options: Any) -> nn.Module:
    return fxfuse.optimize(model, rules=("linear_loss",), strict=True, **options)


def step(model: nn.Module, **inputs: Any) -> tuple[Tensor, Tensor]:
    """The loss, and the gradients of all parameters in one row."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_as_exact(ours: nn.Module, eager: nn.Module, **inputs: Any) -> None:
    truth = step(copy.deepcopy(eager).double(), **inputs)
    for a, b, t in zip(step(ours, **inputs), step(eager, **inputs), truth, strict=True):
        assert error_ratio(a, b, t) <= LIMITS[a.dtype]
