"""A head that gives its logits up, with a backend that runs graphs as they are: what tests of lazy outputs share."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfuse.reporting.records import GraphRecord
from tests.model import giving_up
from tests.model.builders import VOCABULARY
from tests.model.giving_up import GivesLogitsUp

WIDTH = 8


class Token:
    """Lives as long as the autograd node that it hooks."""

    def __call__(self, gradient: Tensor) -> None:
        pass


class Model(nn.Module):
    """Embedding, one layer, projection, loss."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.to(dtype)
        self.hidden: list[weakref.ref[Tensor]] = []
        self.history: list[weakref.ref[Token]] = []  # of what lies in the autograd graph behind the hidden states

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.states(tokens), tokens)

    def states(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(self.embed(tokens)))
        token = Token()
        if hidden.requires_grad:
            hidden.register_hook(token)
        self.hidden.append(weakref.ref(hidden))
        self.history.append(weakref.ref(token))
        return hidden

    def head(self, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.lm_head(hidden)
        return F.cross_entropy(logits.view(-1, VOCABULARY).float(), tokens.view(-1)), logits


def lazy(mode: str = "lazy", dtype: torch.dtype = torch.float32) -> Model:
    """A model whose head is a graph that gives its logits up."""
    model = Model(dtype)
    compiled = torch.compile(model.head, backend=GivesLogitsUp(mode), dynamic=True)
    model.forward = lambda tokens: compiled(model.states(tokens), tokens)  # type: ignore[method-assign]
    return model


def tokens(length: int = 5) -> Tensor:
    return torch.randint(0, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(length))


@pytest.fixture(autouse=True, name="records")
def recording(monkeypatch: pytest.MonkeyPatch) -> list[GraphRecord]:
    made: list[GraphRecord] = []
    make = giving_up.new_record
    monkeypatch.setattr(giving_up, "new_record", lambda: made.append(make()) or made[-1])  # type: ignore[func-returns-value]
    return made


def reads(records: list[GraphRecord]) -> tuple[int, int]:
    """How often the outputs of all graphs were read, and computed."""
    found = [each for record in records for each in record.reads]
    return sum(each.read for each in found), sum(each.materialised for each in found)


def gradients(model: Model, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


class Cube(torch.autograd.Function):
    """Sees the lazy tensor itself: autograd functions are below ``__torch_function__``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x**3).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * 3 * ctx.saved_tensors[0] ** 2


class PassOn(torch.autograd.Function):
    """Gives copies on, as DistributedDataParallel's sink does, and counts the gradients that come back."""

    passed = 0

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.clone() for x in inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        PassOn.passed += 1
        return gradients
