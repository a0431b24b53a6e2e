"""The fused loss head in the hands of a trainer: what it passes, freezes, leaves out and runs under autocast."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

import fxfuse
from tests.model import builders
from tests.model.builders import VOCABULARY, causal_lm
from tests.model.heads import assert_as_exact, batch, model_of, optimized


def test_a_masked_language_model() -> None:
    """Its head is a layer of its own before the projection, which has a bias and the embedding's weight."""
    eager = builders.bert(1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ours = optimized(copy.deepcopy(eager))
    assert_as_exact(ours, eager, **batch())
    fxfuse.report(ours).assert_fused("linear_loss")


def test_what_a_trainer_passes_and_changes() -> None:
    """``num_items_in_batch``, ``logits_to_keep``, other lengths, other batch sizes: one model, one report."""
    eager = model_of("llama")
    ours = optimized(copy.deepcopy(eager))
    inputs = batch()
    assert_as_exact(ours, eager, **inputs, num_items_in_batch=13)
    for rows, length in ((2, 7), (1, 11), (3, 5)):
        ids = torch.randint(3, VOCABULARY, (rows, length))
        assert_as_exact(ours, eager, input_ids=ids, labels=ids)
    for kept in (4, 7):  # the head sees the last positions alone, and is given their labels
        last = inputs["labels"][:, -kept:].contiguous()
        assert_as_exact(ours, eager, **inputs, shift_labels=last, logits_to_keep=kept)
        assert ours(**inputs, shift_labels=last, logits_to_keep=kept).logits.shape == (2, kept, VOCABULARY)
    fxfuse.report(ours).assert_fused("linear_loss")
    assert not fxfuse.report(ours).errors


def test_a_frozen_head() -> None:
    """The other parameters get their gradients through it."""
    eager = causal_lm("llama", 1, tie_word_embeddings=False)
    eager.lm_head.requires_grad_(False)  # type: ignore[operator, union-attr]
    ours = optimized(copy.deepcopy(eager))
    assert_as_exact(ours, eager, **batch())
    assert ours.lm_head.weight.grad is None  # type: ignore[union-attr]
    fxfuse.report(ours).assert_fused("linear_loss")


def test_excluded_it_leaves_the_loss_on_logits() -> None:
    ours = fxfuse.optimize(model_of("llama"), exclude=("linear_loss",), strict=True)
    logits = ours(**batch()).logits
    report = fxfuse.report(ours)
    assert type(logits) is Tensor
    assert report.count("linear_loss") == 0
    report.assert_fused("cross_entropy")


def test_autocast_to_bfloat16() -> None:
    eager = model_of("llama")
    ours = optimized(copy.deepcopy(eager))
    with torch.autocast("cpu", torch.bfloat16):
        expected, loss = eager(**batch()).loss, ours(**batch()).loss
    expected.backward()
    loss.backward()
    reference, gradient = (torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (eager, ours))  # type: ignore[union-attr]
    assert (loss - expected).abs() < 1e-2
    assert (gradient - reference).norm() < 1e-2 * reference.norm()
    fxfuse.report(ours).assert_fused("linear_loss")
