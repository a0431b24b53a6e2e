"""Tests that train in two processes over gloo."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.model.builders import tokens

STEPS = 3


def in_two_processes(work: Callable[..., None], *args: Any) -> list[str]:
    """What ``work(rank, port, *args, failures)`` put among its failures."""
    failures = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(work, (_free_port(), *args, failures), nprocs=2)
    found = []
    while not failures.empty():
        found.append(failures.get())
    return found


def losses_of(model: nn.Module, rank: int) -> list[float]:
    """Of this rank's batches in a few steps, in which the model is trained."""
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    losses = []
    for number in range(STEPS):
        loss = model(**tokens(seed=10 * number + rank))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
