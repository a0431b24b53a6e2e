"""The ops ``fxfuse::spread_rows`` and ``fxfuse::collect_rows``, linear maps that are transposes of each other.

    spread    y[s] = x[source[s]]                              x [t, ...] -> y [s, ...]
    collect   x[i] = sum over j of y[place[i k + j]]           y [s, ...] -> x [t, ...]        s = t k

``source`` holds each of 0 .. t-1 exactly k times, and ``place`` lists for each i where it does: source[place[i k + j]] = i. Who makes
the nodes has proven it (match.py). The derivative of each is the other, so that any number of derivatives are these ops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..lowering import implementation_on

LIBRARY = torch.library.Library("fxfuse", "FRAGMENT")
LIBRARY.define("spread_rows(Tensor x, Tensor source, Tensor place, SymInt k) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.define("collect_rows(Tensor y, Tensor source, Tensor place, SymInt k) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
spread_rows = torch.ops.fxfuse.spread_rows.default
collect_rows = torch.ops.fxfuse.collect_rows.default


def _spread(x: Tensor, source: Tensor, place: Tensor, k: int) -> Tensor:
    return x[source]


def _collect(y: Tensor, source: Tensor, place: Tensor, k: int) -> Tensor:
    if k == 1:
        return y[place]
    if implementation_on(y.device.type) == "triton":
        from ..kernels.collect import collect

        return collect(y.reshape(len(y), -1), place, k).view(-1, *y.shape[1:])
    return y[place].unflatten(0, (-1, k)).sum(1)


def _fake_spread(x: Tensor, source: Tensor, place: Tensor, k: int) -> Tensor:
    return x.new_empty(source.shape[0], *x.shape[1:])


def _fake_collect(y: Tensor, source: Tensor, place: Tensor, k: int) -> Tensor:
    return y.new_empty(place.shape[0] // k, *y.shape[1:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, source, place, ctx.k = inputs
    ctx.save_for_backward(source, place)


def _spread_backward(ctx: Any, arriving: Tensor) -> tuple[Any, ...]:
    return collect_rows(arriving, *ctx.saved_tensors, ctx.k), None, None, None


def _collect_backward(ctx: Any, arriving: Tensor) -> tuple[Any, ...]:
    return spread_rows(arriving, *ctx.saved_tensors, ctx.k), None, None, None


for _name, _run, _fake, _backward in (("spread_rows", _spread, _fake_spread, _spread_backward),
                                      ("collect_rows", _collect, _fake_collect, _collect_backward)):
    for _device in ("CPU", "CUDA"):
        LIBRARY.impl(_name, _run, _device)
    torch.library.register_fake(f"fxfuse::{_name}", _fake, lib=LIBRARY)
    torch.library.register_autograd(f"fxfuse::{_name}", _backward, setup_context=_setup_context, lib=LIBRARY)
