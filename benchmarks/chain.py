"""A block of norms and small products: what an op costs the Python thread inside a compiled block."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.judge import both, forward, fresh
from benchmarks.kernel_cases import Inputs


def host_us(first: tuple[Callable[..., Any], Inputs], second: tuple[Callable[..., Any], Inputs], backward: bool, calls: int
            ) -> tuple[float, float]:
    """CPU microseconds of one call of each: the queue never fills, and nothing waits for the device. Both take turns, and the least of
    many short batches counts, as another process on the machine slows down some of them."""
    measured = both if backward else forward
    sync = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    best = [float("inf"), float("inf")]
    for _ in range(15):
        for k, (fn, inputs) in enumerate((first, second)):
            for _ in range(2):
                measured(fn, inputs)
            sync()
            start = time.perf_counter()
            for _ in range(calls):
                measured(fn, inputs)
            best[k] = min(best[k], (time.perf_counter() - start) / calls)
            sync()
    return best[0] * 1e6, best[1] * 1e6


def chain_of(unit: Callable[..., Any] | None, length: int) -> Callable[..., Any]:
    """A block of `length` products, each after `unit`: what surrounds a norm in a model, too small to wait for."""

    def block(x: torch.Tensor, projection: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        for i in range(length):
            x = torch.mm(x if unit is None else unit(x, weights[i]), projection)
        return x

    return block


def chain_inputs(device: str, length: int) -> Inputs:
    draw = lambda *shape: torch.randn(*shape, device=device, dtype=torch.bfloat16)  # noqa: E731
    args = [draw(8, 64), draw(64, 64) / 8, *(1 + draw(64) / 8 for _ in range(length))]
    return fresh(Inputs(args, list(range(len(args))), [draw(8, 64)]), grad=True)


def launches_of(call: Callable[[], object]) -> int:
    """How many of our kernels one call launches."""
    from fxfuse.kernels import launch

    counted: list[object] = []
    launch.listeners.append(counted.append)
    try:
        call()
    finally:
        launch.listeners.remove(counted.append)
    return len(counted)
