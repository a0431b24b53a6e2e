"""Hooks on lazy logits: those of fully sharded modules run where a gradient comes through, anybody else's are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fxfuse.errors import OutputContractError
from fxfuse.output_contract.tensor import LazyTensor
from fxfuse.reporting.records import GraphRecord
from tests.model.lazy_heads import Cube, Model, lazy, reads, recording, tokens  # noqa: F401

Put = Callable[[Tensor, Callable[[Tensor], Any]], RemovableHandle]


def function_of(module: str, code: str) -> Callable[..., Any]:
    """A function whose frame says that it belongs to a module."""
    names: dict[str, Any] = {"__name__": module}
    exec(f"def function(x, *rest):\n    return {code}", names)
    return names["function"]


put: Put = function_of("torch.distributed.fsdp._fully_shard._fsdp_state", "x.register_hook(*rest)")
USES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {  # what is done with (loss, logits), how often the hook runs
    "the loss alone": (lambda loss, x: loss, 0),
    "a read": (lambda loss, x: x.square().sum(), 1),
    "both": (lambda loss, x: loss + x.square().sum(), 1),
    "a cast, the logits in hand": (lambda loss, x: x.double().square().sum(), 1),
    "two reads": (lambda loss, x: x.sum() + x.double().square().sum(), 1),
    "a copy that is detached": (lambda loss, x: loss + x.detach().sum(), 0),
    "an autograd function": (lambda loss, x: Cube.apply(x), 1),
}


@pytest.mark.parametrize("use", USES)
def test_a_timer_runs_where_a_gradient_comes_through(use: str, records: list[GraphRecord]) -> None:
    function, times = USES[use]
    results = []
    for model in (lazy(), Model()):
        ran: list[Tensor] = []
        loss, logits = model(tokens())
        before = reads(records)
        put(logits, ran.append)
        assert reads(records) == before
        order: list[int] = []
        model.lm_head.weight.register_hook(lambda g, ran=ran, order=order: order.append(len(ran)))
        results.append((torch.autograd.grad(function(loss, logits), list(model.parameters())), ran, order))
    (ours, got, order), (theirs, want, _) = results
    torch.testing.assert_close(ours, theirs)
    assert len(got) == times
    assert order == [times], "before anything behind the logits has its gradient"
    if use not in ("the loss alone", "both", "a copy that is detached"):  # eager's loss passes through its logits
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("steps", [[torch.float64], [torch.float64, torch.bfloat16]], ids=str)
@pytest.mark.parametrize("keep", [True, False], ids=["held", "dropped"])
def test_casts_of_what_was_hooked_have_the_hook(steps: list[torch.dtype], keep: bool) -> None:
    """Mixed precision converts outputs after they were hooked, and drops what they were."""
    ran: list[Tensor] = []
    kept: list[Tensor] = []
    value = lazy()(tokens())[1]
    for dtype in steps:
        put(value, ran.append)
        kept += [value] * keep
        value = value.to(dtype)
        assert type(value) is LazyTensor
    put(value, ran.append)
    value.square().sum().backward()
    assert [x.dtype for x in ran] == [*steps[::-1], torch.float32]


def test_what_was_read_already_is_hooked_too() -> None:
    ran: list[Tensor] = []
    logits = lazy()(tokens())[1]
    assert logits.sum().isfinite()
    handle = put(logits, ran.append)
    logits.square().sum().backward(retain_graph=True)
    assert len(ran) == 1
    handle.remove()
    logits.square().sum().backward()
    assert len(ran) == 1


def test_what_a_timer_gives_back_is_the_gradient() -> None:
    found = []
    for model in (lazy(), Model()):
        logits = model(tokens())[1]
        put(logits, lambda g: 3 * g)
        found.append(torch.autograd.grad(logits.square().sum(), list(model.parameters())))
    assert all(map(torch.equal, *found))


OTHERS: dict[str, Callable[[Tensor], Any]] = {
    "a user's": lambda x: x.register_hook(print),
    "a library's": lambda x: function_of("torchmetrics.distributed.fsdp", "x.register_hook(print)")(x),
    "one that looks like it": lambda x: function_of("torch.distributed.fsdp_of_mine", "x.register_hook(print)")(x),
    "a user's, called by a sharded module": lambda x: function_of("torch.distributed.fsdp.api", "rest[0](x)")(x, hook_of_a_user),
    "a gradient to be kept": lambda x: function_of("torch.distributed.fsdp.api", "x.retain_grad()")(x),
}


def hook_of_a_user(x: Tensor) -> Any:
    return x.register_hook(print)


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("read", [False, True], ids=["unread", "read"])
def test_anybody_elses_is_refused(other: str, read: bool) -> None:
    logits = lazy()(tokens())[1]
    if read:
        logits.sum()
    with pytest.raises(OutputContractError, match="does not pass"):
        OTHERS[other](logits)
