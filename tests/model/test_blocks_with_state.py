"""Blocks that leave something behind, in a model whose one forward calls them: captured or not, the model trains as eager does.

The forward around the blocks is traced before they have run (capture/expected.py). What they leave (a loss on the block, a table in a
cache, a counter) is nothing that the trace has seen, and what an attribute makes them give is nothing that it can guess.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfuse
from tests.model.builders import HIDDEN, VOCABULARY, Block, step, tokens

SINK: list[Tensor] = []


@functools.lru_cache
def table(size: int) -> Tensor:
    return torch.linspace(0.5, 1.5, size)


class LossOnBlock(Block):
    loss: Any = 0.0

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.loss = y.square().mean()
        return y


class LossInList(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        SINK.append(y.square().mean())
        return y


class Filling(Block):
    def forward(self, x: Tensor, sink: list[Tensor]) -> Tensor:
        y = super().forward(x)
        sink.append(y.square().mean())
        return y


class Counting(Block):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * (1 + self.calls)


class TableOnBlock(Block):
    table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None or len(self.table) < x.shape[1]:
            self.table = torch.arange(x.shape[1]).cos()
        return super().forward(x) * self.table[: x.shape[1], None]


class TableInCache(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * table(HIDDEN)


class Pooling(Block):
    pools = False

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y[:, ::2] if self.pools else y


class Pairing(Block):
    both = False

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return (y, y.square().mean()) if self.both else (y, None)


class Stack(nn.Module):
    """Embeds, runs its blocks, projects and takes the loss; other losses, wherever they are, are added."""

    def __init__(self, block: type[Block]) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, HIDDEN), nn.Linear(HIDDEN, VOCABULARY)
        self.blocks = nn.ModuleList([block(HIDDEN, 4) for _ in range(3)])
        for attribute in ("pools", "both"):
            setattr(self.blocks[1], attribute, True)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x, extra, sink = self.embed(input_ids), [], []
        SINK.clear()
        for block in self.blocks:
            out = block(x, sink) if isinstance(block, Filling) else block(x)
            x, more = out if isinstance(out, tuple) else (out, None)
            extra += [] if more is None else [more]
        loss = F.cross_entropy(self.head(x).flatten(0, 1), labels[:, : x.shape[1]].flatten())
        on_blocks = [block.loss for block in self.blocks if isinstance(block, LossOnBlock)]
        return {"loss": loss + sum([*extra, *sink, *SINK, *on_blocks])}


BLOCKS = [LossOnBlock, LossInList, Filling, Counting, TableOnBlock, TableInCache, Pooling, Pairing]


def model_of(block: type[Block], dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return Stack(block).train().to(dtype)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_what_blocks_leave_behind_is_what_eager_leaves(block: type[Block]) -> None:
    batches = [tokens(), tokens(batch=3, length=14)]
    table.cache_clear()
    ours, theirs, truth = model_of(block), model_of(block), model_of(block, torch.float64)
    fxfuse.optimize(ours)
    for batch in batches:
        got, want, exact = (step(model, batch) for model in (ours, theirs, truth))
        assert got.keys() == want.keys()
        for name, value in exact.items():
            error, allowed = (float((r[name].double() - value).norm() / value.norm()) for r in (got, want))
            assert error <= 4 * max(allowed, 2e-7), f"{name} is {error:.1e} off, eager {allowed:.1e}"
    report = fxfuse.report(ours)
    if block is LossInList:
        assert any("LossInList changes something that outlives its call" in note for note in report.notes)
    if block is Counting:
        assert [b.calls for b in ours.blocks] == [b.calls for b in theirs.blocks]
    assert sum(site.status == "fused" for site in report.sites) >= 3, "the blocks are captured all the same"
    assert all(site.launches for site in report.sites if site.status == "fused"), "nothing is told that does not run"
    assert report.errors == []


def test_explain_sees_the_blocks_of_such_a_model() -> None:
    report = fxfuse.explain(model_of(TableInCache), **tokens())
    assert any("blocks" in site.module for site in report.sites)
    assert any(site.rule == "linear_loss" for site in report.sites)


def test_example_inputs_leave_no_trace_on_blocks() -> None:
    model, same = model_of(Counting), model_of(Counting)
    fxfuse.optimize(model, example_inputs=tokens())
    assert [block.calls for block in model.blocks] == [0, 0, 0]
    assert torch.allclose(step(model, tokens())["loss"], step(same, tokens())["loss"])


@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11 crashes when two threads compile, with backend='aot_eager' as well")
def test_models_compile_in_threads_at_once() -> None:
    want = [step(model_of(Block), tokens(length=length))["loss"] for length in (8, 9)]
    models, got = [fxfuse.optimize(model_of(Block)) for _ in want], {}

    def train(which: int) -> None:
        got[which] = step(models[which], tokens(length=8 + which))["loss"]

    threads = [threading.Thread(target=train, args=(which,)) for which in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.allclose(got[which], loss) for which, loss in enumerate(want))
