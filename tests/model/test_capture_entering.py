"""Blocks share one graph though the first one's input needs no gradient; nothing that a caller can see is another for it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxfuse
from fxfuse.capture import entering
from tests.model.builders import llama


class Block(nn.Module):
    """The residual of a norm and a linear; ``also``: gives its input too, as it came."""

    def __init__(self, also: bool = False) -> None:
        super().__init__()
        self.norm, self.linear, self.also = nn.RMSNorm(8, eps=1e-6), nn.Linear(8, 8), also

    def forward(self, x: Tensor) -> Any:
        out = x + self.linear(self.norm(x))
        return (out, x) if self.also else out


class Stack(nn.Module):
    """Blocks over a table of embeddings that is frozen; ``reentrant``: under checkpoints of this sort."""

    def __init__(self, layers: int = 3, reentrant: bool | None = None, also: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 8)
        self.table.requires_grad_(False)
        self.layers = nn.ModuleList(Block(also) for _ in range(layers))
        self.reentrant = reentrant
        self.given: list[Tensor] = []

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for layer in self.layers:
            self.given.append(x)
            out = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
            x, *came = out if isinstance(out, tuple) else (out,)
            assert all(each is self.given[-1] for each in came)
        return x


IDS = torch.arange(10).reshape(2, 5)


def pair(**given: Any) -> tuple[Stack, Stack]:
    """A model, and the same one under fxfuse."""
    torch.manual_seed(0)
    eager = Stack(**given)
    return eager, fxfuse.optimize(copy.deepcopy(eager), strict=True)


def graphs(model: nn.Module) -> list[int]:
    """How often each graph of blocks ran."""
    return sorted(graph.calls for graph in fxfuse.report(model).graphs if graph.kind == "block")


def agree(ours: nn.Module, eager: nn.Module) -> None:
    for a, b in zip(ours.parameters(), eager.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or (a.grad - b.grad).norm() <= 1e-5 * b.grad.norm()


@pytest.mark.parametrize("reentrant", [None, False], ids=["kept", "checkpointed"])
def test_one_graph_and_eagers_gradients(reentrant: bool | None) -> None:
    eager, ours = pair(reentrant=reentrant)
    for model in (eager, ours):
        model(IDS).sum().backward()
    agree(ours, eager)
    assert len(graphs(ours)) == 1
    first = ours.given[0]
    assert (first.requires_grad, first.grad, first.grad_fn) == (False, None, None)
    assert entering._anchor.grad is None


def test_reentrant_checkpoints_train_what_eager_trains() -> None:
    eager, ours = pair(reentrant=True)
    for model in (eager, ours):
        assert not model(IDS).requires_grad  # no input of a checkpoint needs a gradient: nothing is trained


def test_a_block_alone_has_the_graph_of_its_own_input() -> None:
    """The gradient of its input is computed where other blocks need it, and not for one that has no equals."""
    lengths = []
    for layers in (1, 2):
        model = llama(layers=layers)
        model.get_input_embeddings().requires_grad_(False)
        fxfuse.optimize(model, strict=True)
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        (graph,) = (each for each in fxfuse.report(model).graphs if each.kind == "block")
        assert graph.calls == layers
        lengths.append(len(graph.backward_source))
    assert lengths[0] < lengths[1]


def test_frozen_blocks_want_no_gradient() -> None:
    eager, ours = pair()
    for model in (eager, ours):
        model.layers[:2].requires_grad_(False)
        out = model(IDS)
        assert [x.requires_grad for x in model.given] == [False] * 3
        out.sum().backward()
    agree(ours, eager)
    for model in (eager, ours):
        model.requires_grad_(False)
        assert not model(IDS).requires_grad


def test_an_input_that_comes_out_is_the_one_that_went_in() -> None:
    for model in pair(also=True):  # (the model asserts it)
        model(IDS).sum().backward()


def test_hooks_see_what_they_see_in_eager() -> None:
    eager, ours = pair()
    seen: dict[Stack, list[Any]] = {eager: [], ours: []}
    for model, found in seen.items():
        model.layers[0].register_forward_pre_hook(lambda _, args, found=found: found.append(args[0].requires_grad))
        model.layers[0].register_forward_hook(lambda _, args, out, found=found: found.append((args, out)[1].requires_grad))
        model.layers[0].register_full_backward_hook(lambda _, into, out, found=found: found.append([g is None for g in (*into, *out)]))
        model(IDS).sum().backward()
    assert seen[ours] == seen[eager]


def test_a_write_to_the_input_is_seen_by_the_backward() -> None:
    _, ours = pair()
    loss = ours(IDS).sum()
    ours.given[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_enters_is_the_same_memory_and_no_view() -> None:
    block, x = Block(), torch.randn(3, 8)
    (entry,) = entering.entered(block, (x,))
    assert entry.requires_grad
    assert (entry.data_ptr(), entry._version, entry._is_view()) == (x.data_ptr(), x._version, False)
    x.add_(1)
    assert entry._version == x._version
    with torch.no_grad():
        assert entering.entered(block, (x,)) == (x,)
    assert entering.entered(block, (torch.arange(3),))[0].dtype == torch.int64
    with torch.inference_mode():
        made = torch.ones(3, 8)
    assert entering.entered(block, (made,))[0] is made
