"""A head's decorators run as Python, around what is captured; whatever they do stays as it was."""

from __future__ import annotations

import functools
from collections.abc import Callable
from copy import deepcopy
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import convert_frame
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import fxfuse
from fxfuse.capture.decorated import decorated

SIZES: dict[str, Any] = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                             num_key_value_heads=2)  # fmt: skip


def noted(where: list[str], word: str) -> Callable[[Callable], Callable]:
    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def wrapper(*args: Any, times: int = 1, **kwargs: Any) -> Any:
            where.append(word)
            return function(*args, **kwargs), times

        wrapper.note = word  # type: ignore[attr-defined]
        return wrapper

    return decorate


def test_decorators_around_another_function() -> None:
    where: list[str] = []

    @noted(where, "outer")
    @noted(where, "inner")
    def own(x: int, *, y: int = 2) -> int:
        return x + y

    inner, around = decorated(own)
    assert inner is own.__wrapped__.__wrapped__
    other = around(lambda x, *, y=2: x * y)
    assert other(5, y=3) == ((15, 1), 1)
    assert where == ["outer", "inner"]
    assert other(5, times=4) == ((10, 1), 4)
    assert (other.note, other.__name__) == ("outer", "own")
    assert own(5) == ((7, 1), 1)  # untouched


@pytest.mark.parametrize("forward", [
    lambda self, x: x,
    functools.partial(max, 1),
    functools.wraps(F.relu)(lambda x: F.relu(x)),  # holds nothing of its own
    torch.no_grad()(F.relu).__get__(1),
], ids=["plain", "no function", "a global", "bound"])  # fmt: skip
def test_what_is_no_decorator_stays(forward: Any) -> None:
    inner, around = decorated(forward)
    assert inner is forward
    assert around(len) is len


def small() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).train()


def traced_frames(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    of_torch = convert_frame._compile

    def noting(code: Any, *given: Any, **named: Any) -> Any:
        names.append(code.co_name)
        return of_torch(code, *given, **named)

    monkeypatch.setattr(convert_frame, "_compile", noting)
    return names


def test_no_frame_of_a_decorator_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    names = traced_frames(monkeypatch)
    tokens = torch.randint(0, 97, (2, 12))
    fxfuse.optimize(small())(input_ids=tokens, labels=tokens).loss.backward()
    assert "forward" in names
    assert not [name for name in names if "wrapper" in name]


@pytest.mark.parametrize("return_dict", [True, False])
def test_what_is_returned_is_the_models(return_dict: bool) -> None:
    tokens = torch.randint(0, 97, (2, 12))
    plain, model = small(), fxfuse.optimize(small())
    wanted = plain(input_ids=tokens, labels=tokens, return_dict=return_dict)
    found = model(input_ids=tokens, labels=tokens, return_dict=return_dict)
    assert type(found) is type(wanted)
    torch.testing.assert_close(found[0], wanted[0])
    assert "forward" not in vars(model)


def test_hooks_of_the_head_run_around_it() -> None:
    model, calls = fxfuse.optimize(small()), []
    model.register_forward_pre_hook(lambda module, args, kwargs: calls.append("before"), with_kwargs=True)
    model.register_forward_hook(lambda module, args, out: calls.append(type(out).__name__))
    tokens = torch.randint(0, 97, (2, 12))
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert calls == ["before", "CausalLMOutputWithPast"]
    assert "forward" not in vars(model)


def test_a_forward_of_the_instance_is_called() -> None:
    model, calls = fxfuse.optimize(small()), []
    own = type(model).forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append("own")
        return own(self, *args, **kwargs)

    model.forward = MethodType(forward, model)
    tokens = torch.randint(0, 97, (2, 12))
    wanted = small()(input_ids=tokens, labels=tokens).loss
    torch.testing.assert_close(model(input_ids=tokens, labels=tokens).loss, wanted)
    assert calls
    assert vars(model)["forward"].__func__ is forward


def test_an_error_leaves_no_forward_behind() -> None:
    model = fxfuse.optimize(small())
    tokens = torch.randint(0, 97, (2, 12))
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        model(input_ids=tokens, labels=tokens[:, :5])
    assert "forward" not in vars(model)
    model(input_ids=tokens, labels=tokens).loss.backward()
    copy = deepcopy(model)
    assert "forward" not in vars(copy)


def test_the_loss_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(model: nn.Module, tokens: Tensor) -> Tensor:
        return model(input_ids=tokens, labels=tokens).loss

    tokens = torch.randint(0, 97, (2, 12))
    plain, model = small(), fxfuse.optimize(small())
    loss(plain, tokens).backward()
    loss(model, tokens).backward()
    fxfuse.report(model).assert_fused("linear_loss")
    torch.testing.assert_close(model.lm_head.weight.grad, plain.lm_head.weight.grad)
