"""Sequences packed into one row: positions start again at each, nothing is seen across, and the loss is that of the sequences alone.

The mask of a pack is made by the model from ``position_ids``; it is causal within each sequence, never plain causal.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from tests.model import builders as build
from tests.model.builders import VOCABULARY, step, tokens

LENGTHS = (5, 8, 3)
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: build.llama(1),
    "written out": lambda: build.llama(1, attn_implementation="eager"),
    "lora": lambda: build.with_lora(build.llama(1)),
    "softcap and windows": lambda: build.gemma2(attn_implementation="eager"),
}


def sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCABULARY, (1, length), generator=generator) for length in LENGTHS]


def packed() -> dict[str, Tensor]:
    """One row; the first token of each sequence is not learnt, as it would be predicted from the sequence before."""
    ids, rows = torch.cat(sequences(), 1), [torch.arange(length) for length in LENGTHS]
    positions = torch.cat(rows)[None]
    return {"input_ids": ids, "labels": ids.masked_fill(positions == 0, -100), "position_ids": positions}


def alone(model: nn.Module) -> dict[str, Tensor]:
    """Loss and gradients over the same tokens, sequence by sequence."""
    total: dict[str, Tensor] = {}
    learnt = sum(length - 1 for length in LENGTHS)
    for ids in sequences():
        for name, value in step(model, {"input_ids": ids, "labels": ids, "use_cache": False}).items():
            total[name] = total.get(name, torch.zeros(())) + value * (ids.shape[1] - 1) / learnt
    return total


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        assert (ours[name] - want).norm() <= 2e-5 * want.norm(), name


@pytest.mark.parametrize("name", MODELS)
def test_a_pack_is_its_sequences(name: str) -> None:
    """Also after a batch with a plain causal mask, whose graph must not serve the pack, and the other way round."""
    model, eager = fxfuse.optimize(MODELS[name](), validate="off", remainder="eager", strict=True), MODELS[name]()
    for batch in (tokens(1, sum(LENGTHS)), packed(), tokens(1, sum(LENGTHS), seed=1)):
        assert_close(step(model, {**batch, "use_cache": False}), step(eager, {**batch, "use_cache": False}))
    assert_close(step(model, {**packed(), "use_cache": False}), alone(eager))
    report = fxfuse.report(model)
    assert report.errors == []
    assert not [note for note in report.notes if "eager" in note]
    report.assert_fused("linear_loss")
