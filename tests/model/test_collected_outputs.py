"""Attention weights, hidden states and router logits, collected by transformers' hooks inside of blocks: blocks stay captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

import fxfuse
from tests.model import builders as build
from tests.model.builders import CAPTURED, PassThrough, differences, step, tokens


@pytest.fixture(autouse=True)
def pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs run unchanged, bit for bit as eager."""
    CAPTURED.clear()
    monkeypatch.setattr("fxfuse.api._backend", lambda *options: PassThrough())


def outputs(model: nn.Module, **wanted: Any) -> dict[str, Tensor]:
    """What is collected, and the gradients of a sum over it."""
    model.zero_grad(set_to_none=True)
    out = model(**tokens(), use_cache=False, **wanted)
    names = [name for name in ("hidden_states", "attentions", "router_logits") if out.get(name) is not None]
    found = {f"{name}.{i}": value for name in names for i, value in enumerate(out[name])}
    sum(value.float().square().sum() for value in found.values()).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in found.items()} | grads


def eager_attention() -> nn.Module:
    return build.llama(3, attn_implementation="eager")


def router() -> nn.Module:
    """Its loss has a term that balances the experts."""
    return build.mixtral(2, output_router_logits=True)


@pytest.mark.parametrize(
    ("make", "wanted"),
    [(eager_attention, {"output_attentions": True, "output_hidden_states": True}), (eager_attention, {"output_hidden_states": True}),
     (router, {})],
)  # fmt: skip
def test_they_are_eagers_and_blocks_stay_captured(make: Callable[[], nn.Module], wanted: dict[str, bool]) -> None:
    """Before they are asked for, while they are, and afterwards, when the hooks are still there."""
    model, eager = fxfuse.optimize(make()), make()
    for _ in range(2):
        assert differences(step(model, {**tokens(), "use_cache": False}), step(eager, {**tokens(), "use_cache": False})) == []
        ours, theirs = outputs(model, **wanted), outputs(eager, **wanted)
        assert any("." in name and name.split(".")[0] in ("hidden_states", "attentions", "router_logits") for name in theirs)
        assert differences(ours, theirs) == []
    report = fxfuse.report(model)
    assert report.errors == []
    assert not [note for note in report.notes if "eager" in note], report.notes
    assert len(CAPTURED[""]) <= 3 + 3  # block, norm, head; the block and the head that collect, the block with hooks that do not


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_under_checkpoints(reentrant: bool) -> None:
    def make() -> nn.Module:
        model = router()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        return model

    model, eager = fxfuse.optimize(make()), make()
    for seed in range(2):
        assert differences(step(model, tokens(seed=seed)), step(eager, tokens(seed=seed))) == []
    assert not [note for note in fxfuse.report(model).notes if "eager" in note]


def test_nothing_is_left_on_the_librarys_variable_when_a_call_fails() -> None:
    from transformers.utils import output_capturing

    model = fxfuse.optimize(router())
    step(model, tokens())

    def fail(*args: Any) -> None:
        raise KeyError("stop")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="stop"):
        step(model, tokens())
    handle.remove()
    variable = output_capturing._active_collector
    assert (variable.compiling, variable.global_var, variable.context_var.get()) == (False, None, None)
    assert differences(step(model, tokens()), step(router(), tokens())) == []
