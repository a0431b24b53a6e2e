"""One forward that runs its backbone twice is several graphs: the logits of the first are read in the second, and after it.

And a call that eager refuses as well is no reason to leave a module alone from then on.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxfuse
from tests.model.builders import HIDDEN, VOCABULARY, Block, step, tokens


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks = nn.ModuleList([Block(HIDDEN, 4) for _ in range(2)])

    def forward(self, input_ids: Tensor) -> Tensor:
        x = F.dropout(self.embed(input_ids), 0.2)
        for block in self.blocks:
            x = block(x)
        return x


class Twice(nn.Module):
    """R-Drop: two draws of dropout, two losses, and the divergence between their logits."""

    def __init__(self, divergence: bool = True) -> None:
        super().__init__()
        self.body, self.head, self.divergence = Body(), nn.Linear(HIDDEN, VOCABULARY, bias=False), divergence

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        one = self.head(self.body(input_ids))
        loss = F.cross_entropy(one.flatten(0, 1), labels.flatten())
        two = self.head(self.body(input_ids))
        loss = loss + F.cross_entropy(two.flatten(0, 1), labels.flatten())
        if self.divergence:
            loss = loss + F.kl_div(one.log_softmax(-1), two.softmax(-1), reduction="batchmean")
        return {"loss": loss, "logits": one}


class Reading(nn.Module):
    """Reads the logits of the first pass, as a metric or a further loss does, also under a checkpoint."""

    def __init__(self, model: nn.Module, checkpointed: bool) -> None:
        super().__init__()
        self.model, self.checkpointed = model, checkpointed

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        out = self.model(**batch)
        size = checkpoint(lambda z: z.softmax(-1).square().sum(), out["logits"], use_reentrant=False) if self.checkpointed \
            else out["logits"].square().mean()
        return {"loss": out["loss"] + size}


def made(divergence: bool) -> nn.Module:
    torch.manual_seed(0)
    return Twice(divergence).train()


@pytest.mark.parametrize("divergence", [True, False])
@pytest.mark.parametrize("checkpointed", [True, False])
def test_the_logits_of_both_passes_can_be_read(divergence: bool, checkpointed: bool) -> None:
    ours = fxfuse.optimize(made(divergence))
    got, want = (step(Reading(model, checkpointed), tokens()) for model in (ours, made(divergence)))
    assert got.keys() == want.keys()
    for name in want:  # (dropout draws other numbers in float64)
        assert torch.allclose(got[name], want[name], rtol=1e-4, atol=1e-5 * float(want[name].abs().max())), name
    assert any(site.rule == "linear_loss" and site.status == "fused" for site in fxfuse.report(ours).sites)


class Once(Twice):
    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.body(input_ids))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


class InOnePiece(Body):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Any]:
        return {"loss": F.cross_entropy(self.head(super().forward(input_ids)).flatten(0, 1), labels.flatten())}


@pytest.mark.parametrize("make", [Once, InOnePiece])
@pytest.mark.parametrize("wrong", ["labels", "input_ids"])
def test_after_a_call_that_eager_refuses_too_the_model_is_captured(make: Any, wrong: str) -> None:
    torch.manual_seed(0)
    model, bad = fxfuse.optimize(make().train()), tokens()
    bad[wrong] = bad[wrong][:, :-1] if wrong == "labels" else bad[wrong].float()
    for _ in range(2):
        with pytest.raises((ValueError, RuntimeError)):
            model(**bad)
    step(model, tokens())
    report = fxfuse.report(model)
    assert any(site.rule == "linear_loss" and site.status == "fused" for site in report.sites)
    assert not any("not captured" in note or "stays eager" in note for note in report.notes)
