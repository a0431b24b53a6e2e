"""Training as it is written, in the ways that a recording could get wrong: what each gives must be the same with CUDA graphs.

A script takes a ``Run``, which has the model, its optimizer and a loss of batch ``index`` at a length; it yields what is to be equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxfuse
from tests.offloading import Stack as Blocks

Script = Callable[["Run"], Iterator[Tensor]]
WIDTH, DEPTH = 16, 3


@dataclass
class Run:
    """One model in training."""

    model: nn.Module
    forward: Callable[[nn.Module, int, int], Tensor]
    length: int = 6

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=0.02)

    def __call__(self, index: int, length: int = 0) -> Tensor:
        """What the model gives for a batch."""
        return self.forward(self.model, index, length or self.length)

    def rows(self, index: int) -> Tensor:
        """An input of a stack's blocks."""
        weight = self.model.first.weight
        return batch(index, self.length, weight.shape[1]).to(weight)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, index: int, length: int = 0) -> Tensor:
        """Forward, backward, optimizer."""
        loss = self(index, length).square().mean()
        loss.backward()
        self.update()
        return loss.detach()


class Stack(nn.Module):
    """Blocks behind a layer that is trained, so that they all are one graph."""

    def __init__(self, width: int = WIDTH, depth: int = DEPTH) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.body = Blocks(depth, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.first(x))


def batch(index: int, rows: int, width: int = WIDTH) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(index))


def results(script: Script, run: Run) -> list[Tensor]:
    """What a script gives, and the weights that it ends with."""
    return [*script(run), *(p.detach().clone() for p in run.model.parameters())]


def told(model: nn.Module) -> str:
    """What the report says of the recordings of the model's blocks."""
    return "\n".join(note for note in fxfuse.report(model).notes if note.startswith("CUDA graphs"))


def steps(run: Run) -> Iterator[Tensor]:
    for index in range(6):
        yield run.step(index)


def accumulated(run: Run) -> Iterator[Tensor]:
    """Gradients that outlive the replays that follow."""
    for index in range(4):
        for part in range(3):
            loss = run(3 * index + part).square().mean()
            loss.backward()
            yield loss.detach()
        run.update()


def zeroed_in_place(run: Run) -> Iterator[Tensor]:
    for index in range(5):
        run(index).square().mean().backward()
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=False)
        yield next(run.model.parameters()).detach().clone()


def lengths(run: Run) -> Iterator[Tensor]:
    """More lengths than are recorded."""
    for index in range(18):
        yield run.step(index, run.length + index % 6)


def evaluated_between(run: Run) -> Iterator[Tensor]:
    for index in range(4):
        yield run.step(index)
        with torch.no_grad():
            yield run(100 + index).clone()


def two_forwards(run: Run) -> Iterator[Tensor]:
    """Before one backward."""
    for index in range(5):
        loss = (run(2 * index).square() - run(2 * index + 1).square()).mean().exp()
        loss.backward()
        run.update()
        yield loss.detach()


def kept_outputs(run: Run) -> Iterator[Tensor]:
    kept = []
    for index in range(6):
        kept.append(run(index).detach())  # the same memory as the output's
        yield run.step(50 + index)
    yield from kept


def last_output(run: Run) -> Iterator[Tensor]:
    """A loop that has the output of the step before until the forward is done."""
    for index in range(10):
        out = run(index)
        loss = out.square().mean()
        loss.backward()
        run.update()
        yield loss.detach()


def kept_graphs(run: Run) -> Iterator[Tensor]:
    """For a second backward."""
    for index in range(6):
        loss = run(index).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        yield next(p.grad for p in run.model.parameters() if p.grad is not None).clone()
        run.update()


def abandoned_forwards(run: Run) -> Iterator[Tensor]:
    """Whose backward never comes."""
    for index in range(6):
        abandoned = run(60 + index)
        yield run.step(index)
        yield abandoned.detach()


def moved_weights(run: Run) -> Iterator[Tensor]:
    for index in range(9):
        yield run.step(index)
        if index == 3:
            for parameter in run.model.parameters():
                parameter.data = parameter.data.clone() * 1.25


def gradient_of_the_input(run: Run) -> Iterator[Tensor]:
    """Kept over steps, for the blocks alone."""
    kept = []
    for index in range(6):
        x = run.rows(index).requires_grad_()
        run.model.body(x).square().mean().backward()
        run.update()
        kept.append(x.grad)
    yield from kept


def skipped_blocks(run: Run) -> Iterator[Tensor]:
    """In one step this one is left out, in the next another: what a block is given lies elsewhere each time."""
    for index in range(12):
        x = run.rows(index).requires_grad_()
        for number, block in enumerate(run.model.body.blocks):
            x = block(x) if index % 5 != number else x
        loss = x.square().mean()
        loss.backward()
        run.update()
        yield loss.detach()


def checkpointed(run: Run, reentrant: bool = False) -> Iterator[Tensor]:
    """Each block by itself."""
    for index in range(8):
        x = run.rows(index).requires_grad_()
        for block in run.model.body.blocks:
            x = checkpoint(block, x, use_reentrant=reentrant)
        loss = x.square().mean()
        loss.backward()
        run.update()
        yield loss.detach()


def checkpointed_with_reentry(run: Run) -> Iterator[Tensor]:
    yield from checkpointed(run, reentrant=True)


def checkpointed_twice(run: Run) -> Iterator[Tensor]:
    """Two backwards of one graph, and outputs that are kept."""
    kept = []
    for index in range(8):
        x = run.rows(index).requires_grad_()
        for block in run.model.body.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        loss = x.square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        kept.append(x.detach())
        run.update()
    yield from kept


ON_ANY_MODEL = (steps, accumulated, zeroed_in_place, lengths, evaluated_between, two_forwards, last_output, kept_outputs, kept_graphs,
                abandoned_forwards, moved_weights)
ON_STACKS = (gradient_of_the_input, skipped_blocks, checkpointed, checkpointed_with_reentry, checkpointed_twice)
