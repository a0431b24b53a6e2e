"""Equal sizes of a block's call are one size in its graph where they mean the same; where they are equal by chance they are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse.capture.equal_sizes import equal_is_same, equal_is_same_in_head
from fxfuse.reporting.records import GraphRecord
from tests.model.builders import llama

B, S, D, H = 2, 24, 64, 16
HIDDEN = torch.empty(B, S, D)
ANGLES = (torch.empty(1, S, H), torch.empty(1, S, H))
MASK = torch.empty(B, 1, S, S)
PLACES = torch.arange(S)[None]


@pytest.mark.parametrize(("args", "kwargs"), [
    ((HIDDEN,), {}),
    ((HIDDEN,), dict(position_embeddings=ANGLES, attention_mask=MASK, position_ids=PLACES, use_cache=False)),
    ((HIDDEN, None, MASK.bool()), dict(cache_position=PLACES[0], past_key_values=None, dropout=0.1)),
    ((HIDDEN, torch.empty(B, S + 1, D)), {}),
    ((HIDDEN,), dict(rows=7)),
])  # fmt: skip
def test_sizes_of_one_meaning(args: tuple, kwargs: dict[str, Any]) -> None:
    assert equal_is_same(args, kwargs)


@pytest.mark.parametrize(("args", "kwargs"), [
    ((torch.empty(S, S, D),), {}),  # as many rows as tokens
    ((torch.empty(B, D, D),), {}),  # as long as wide
    ((torch.empty(B, H, D),), dict(position_embeddings=(torch.empty(1, H, H),))),  # as long as a head is wide
    ((torch.empty(H, S, D),), dict(position_embeddings=ANGLES)),
    ((HIDDEN, torch.empty(B, S, D)), {}),  # an encoder's states, as many by chance
    ((HIDDEN,), dict(attention_mask=torch.empty(B, S, S, S))),  # as many heads
    ((HIDDEN,), dict(rows=S)),
    ((HIDDEN,), dict(cache=object())),  # of which nothing is known
    ((HIDDEN[0],), {}),
    ((), dict(hidden_states=HIDDEN)),
    ((torch.arange(6).view(1, 2, 3),), {}),
])  # fmt: skip
def test_sizes_that_are_equal_by_chance(args: tuple, kwargs: dict[str, Any]) -> None:
    assert not equal_is_same(args, kwargs)


IDS = torch.zeros(B, S, dtype=torch.long)
WEIGHTS = (torch.empty(96, D), torch.empty(D))


@pytest.mark.parametrize(("args", "kwargs"), [
    ((IDS,), dict(labels=IDS, attention_mask=IDS.bool(), logits_to_keep=0, use_cache=False, num_items_in_batch=torch.tensor(9))),
    ((), dict(inputs_embeds=HIDDEN, labels=IDS)),
    ((torch.zeros(B, S + 1, dtype=torch.long),), dict(labels=IDS)),
])  # fmt: skip
def test_sizes_of_one_meaning_in_a_head(args: tuple, kwargs: dict[str, Any]) -> None:
    assert equal_is_same_in_head(args, kwargs, WEIGHTS)


@pytest.mark.parametrize(("args", "kwargs"), [
    ((torch.zeros(S, S, dtype=torch.long),), {}),
    ((torch.zeros(B, D, dtype=torch.long),), {}),  # as long as wide
    ((torch.zeros(96, S, dtype=torch.long),), {}),  # as many rows as words
    ((IDS,), dict(logits_to_keep=7)),
    ((IDS,), dict(logits_to_keep=torch.arange(7))),
    ((IDS,), dict(pictures=torch.empty(B, 3, S, S))),
    ((IDS,), dict(cache=object())),
    ((nn.Parameter(HIDDEN),), {}),
])  # fmt: skip
def test_sizes_that_are_equal_by_chance_in_a_head(args: tuple, kwargs: dict[str, Any]) -> None:
    assert not equal_is_same_in_head(args, kwargs, WEIGHTS)


def test_a_number_that_was_zero_once() -> None:
    """How many logits are kept: a constant while it is zero, one graph for all others, whose values are eager's."""
    torch._dynamo.reset()
    model, plain = llama(layers=1), llama(layers=1)
    plain.load_state_dict(model.state_dict())
    fxfuse.optimize(model, strict=True)
    ids = torch.randint(3, 90, (2, 24))
    counts = []
    for keep in (0, 5, 9, 3, 0):
        kept = model(input_ids=ids, logits_to_keep=keep, use_cache=False).logits
        torch.testing.assert_close(kept, plain(input_ids=ids, logits_to_keep=keep, use_cache=False).logits)
        counts.append(len(graphs(model)))
    assert counts[1:] == counts[1:2] * 4


def graphs(model: nn.Module) -> list[GraphRecord]:
    return fxfuse.report(model).graphs


@pytest.mark.parametrize(("batch", "length"), [(2, 24), (16, 24), (2, 16), (16, 16), (2, 64), (3, 112)])
def test_other_sizes_compile_nothing_whatever_the_first_were(batch: int, length: int) -> None:
    """(The head size is 16, the width 64, the MLP's 112.)"""
    torch._dynamo.reset()
    model = fxfuse.optimize(llama(layers=2), strict=True)

    def step(batch: int, length: int) -> Tensor:
        ids = torch.randint(3, 90, (batch, length))
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return ids

    step(batch, length)
    first = len(graphs(model))
    for sizes in ((2, 9), (5, 17), (7, 7), (4, 16), (2, 64)):
        step(*sizes)
    assert len(graphs(model)) == first
    assert fxfuse.report(model).errors == []


class Block(nn.Module):
    """A block over states and an encoder's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.across = nn.RMSNorm(8, eps=1e-6), nn.Linear(8, 8)

    def forward(self, x: Tensor, encoded: Tensor) -> Tensor:
        return x + self.across(self.norm(x)) @ encoded.transpose(1, 2) @ encoded


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor, encoded: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, encoded)
        return x


def test_lengths_of_two_streams_that_were_equal_once() -> None:
    model = fxfuse.optimize(Decoder(), strict=True)
    for mine, theirs in ((5, 5), (6, 9), (11, 4)):
        model(torch.randn(2, mine, 8), torch.randn(2, theirs, 8)).sum().backward()
    assert [graph.calls for graph in graphs(model) if graph.kind == "block"] == [9]
