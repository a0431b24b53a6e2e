"""Capture, cell by cell: {plain, adapters before, adapters after} x what people do with a model.

Every cell compares with eager bit for bit (the backend runs graphs unchanged) and counts graphs.
"""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from fxfuse.capture import find_installation, install, is_copy, uninstall
from tests.model import builders as build
from tests.model.builders import CAPTURED, Graphs, PassThrough, differences, step, tokens

ROUTES = ("plain", "adapters before", "adapters after")
SOME = ("plain", pytest.param("adapters before", marks=pytest.mark.slow), "adapters after")
PLAIN = ("plain", *(pytest.param(route, marks=pytest.mark.slow) for route in ROUTES[1:]))


@pytest.fixture(autouse=True)
def nothing_captured() -> None:
    CAPTURED.clear()


def model_for(route: str, layers: int = 2, **changes: Any) -> nn.Module:
    """An eager model of the shape that ``route`` ends with."""
    model = build.llama(layers, **changes)
    return model if route == "plain" else build.with_lora(model)


def captured_for(route: str, layers: int = 2, **changes: Any) -> nn.Module:
    """The same model with capture installed, at the moment that ``route`` says."""
    model = build.llama(layers, **changes)
    if route == "plain":
        install(model, PassThrough())
    elif route == "adapters before":
        model = build.with_lora(model)
        install(model, PassThrough())
    else:
        install(model, PassThrough())
        model = build.with_lora(model)
    return model


def graphs() -> Graphs:
    return CAPTURED.get("", Graphs())


# Blocks (with adapters too, where the first one's input needs no gradient and the others' does), one norm, one head.
EXPECTED = 3


@pytest.mark.parametrize("route", SOME)
@pytest.mark.parametrize("use_cache", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_step_equals_eager_in_few_graphs(route: str, use_cache: bool):
    want = step(model_for(route, layers=3), tokens(), use_cache=use_cache)
    model = captured_for(route, layers=3)
    assert differences(step(model, tokens(), use_cache=use_cache), want) == []
    assert len(graphs()) == EXPECTED
    assert graphs().calling("cross_entropy") == 1
    for length in (9, 17):
        batch = tokens(length=length)
        assert differences(step(model, batch, use_cache=use_cache), step(model_for(route, 3), batch)) == []
    assert len(graphs()) == EXPECTED, "another length is no other graph"
    assert find_installation(model).errors() == []


@pytest.mark.parametrize("route", PLAIN)
def test_the_cache_of_a_training_call_is_what_eager_leaves(route: str):
    want = model_for(route)(**tokens(), use_cache=True).past_key_values
    model = captured_for(route)
    got = model(**tokens(), use_cache=True).past_key_values
    assert type(got) is type(want)
    assert got.get_seq_length() == want.get_seq_length()
    for ours, theirs in zip(got.layers, want.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


@pytest.mark.parametrize("route", ROUTES)
def test_generate_is_eager_and_equal(route: str):
    prompt = tokens()["input_ids"]
    want = model_for(route).eval().generate(input_ids=prompt, max_new_tokens=6, do_sample=False)
    model = captured_for(route).eval()
    assert torch.equal(model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False), want)
    assert graphs() == []


@pytest.mark.parametrize("route", PLAIN)
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing(route: str, reentrant: bool):
    def checkpointed(model: nn.Module) -> nn.Module:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        return model

    want = step(checkpointed(model_for(route, attention_dropout=0.2)), tokens())
    model = checkpointed(captured_for(route, attention_dropout=0.2))
    assert differences(step(model, tokens()), want) == []
    # Reentrant: blocks also run without gradients, on inputs that require them: a graph of its own.
    assert len(graphs()) == 3 + reentrant


@pytest.mark.parametrize("route", PLAIN)
def test_a_deepcopy_trains_its_own_weights_and_can_be_installed(route: str):
    model = captured_for(route)
    first = step(model, tokens())
    made = len(graphs())
    twin = copy.deepcopy(model)
    assert find_installation(twin) is None
    assert is_copy(twin)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.25)
    changed = step(twin, tokens())
    assert not torch.equal(changed["loss"], first["loss"])
    assert differences(step(model, tokens()), first) == []
    assert len(graphs()) == made, "the copy is eager"
    install(twin, PassThrough())
    assert differences(step(twin, tokens()), changed) == []
    assert len(graphs()) == made, "and once installed it shares the graphs of its class"
    assert not is_copy(twin)


@pytest.mark.parametrize("route", PLAIN)
def test_pickles_and_checkpoints_are_those_of_the_plain_model(route: str, tmp_path):
    model = captured_for(route)
    want = step(model, tokens())
    assert list(model.state_dict()) == list(model_for(route).state_dict())
    loaded = pickle.loads(pickle.dumps(model))
    assert differences(step(loaded, tokens()), want) == []
    assert find_installation(loaded) is None
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert differences(step(torch.load(buffer, weights_only=False), tokens()), want) == []
    model.save_pretrained(tmp_path)
    assert any(tmp_path.glob("*.safetensors"))
    if route == "plain":
        assert differences(step(type(model).from_pretrained(tmp_path).train(), tokens()), want) == []


@pytest.mark.parametrize("route", SOME)
def test_twelve_models_of_a_class_share_their_graphs(route: str):
    for seed in range(12):
        model = captured_for(route, seed=seed)
        step(model, tokens())
        assert find_installation(model).errors() == []
    assert len(graphs()) == EXPECTED
    assert differences(step(model, tokens()), step(model_for(route, seed=11), tokens())) == []


@pytest.mark.parametrize("route", PLAIN)
def test_a_batch_of_one(route: str):
    model = captured_for(route)
    step(model, tokens())
    assert differences(step(model, tokens(batch=1)), step(model_for(route), tokens(batch=1))) == []
    assert len(graphs()) <= 2 * EXPECTED
    made = len(graphs())
    step(model, tokens(batch=1, length=21))
    step(model, tokens(batch=5))
    assert len(graphs()) == made


@pytest.mark.parametrize("route", PLAIN)
def test_hooks_added_later_fire(route: str):
    def hooked(model: nn.Module) -> tuple[nn.Module, list[str]]:
        seen: list[str] = []
        base = model if route == "plain" else model.get_base_model()
        layer = base.model.layers[0]
        places = {
            "block": layer,
            "inside": layer.mlp,
            "leaf": base.model.norm,
            "backbone": base.model,
            "projection": base.lm_head,
            "top": base,
        }
        for name, module in places.items():
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
            module.register_forward_pre_hook(lambda *_, name=name: seen.append("before " + name))
            module.register_full_backward_hook(lambda *_, name=name: seen.append("backward " + name))
        layer.mlp.down_proj.register_forward_hook(lambda module, args, out: out * 1.5)
        layer.register_forward_pre_hook(lambda module, args: (args[0] * 0.5, *args[1:]))
        return model, seen

    model = captured_for(route)
    step(model, tokens())
    ours, seen = hooked(model)
    theirs, wanted = hooked(model_for(route))
    assert differences(step(ours, tokens()), step(theirs, tokens())) == []
    assert sorted(seen) == sorted(wanted), (seen, wanted)
    assert set(seen) >= {"block", "inside", "before block", "backward block", "backward inside"}


@pytest.mark.parametrize("route", PLAIN)
def test_uninstall_is_exact(route: str):
    model = captured_for(route)
    step(model, tokens())
    assert uninstall(model)
    fresh = model_for(route)
    for (name, ours), (_, theirs) in zip(model.named_modules(), fresh.named_modules(), strict=True):
        assert set(vars(ours)) == set(vars(theirs)), name
    made = len(graphs())
    assert differences(step(model, tokens()), step(fresh, tokens())) == []
    assert len(graphs()) == made
    assert not uninstall(model)


def test_a_plain_forward_call_is_untouched_in_signature():
    import inspect

    model, fresh = captured_for("plain"), build.llama()
    for (name, ours), (_, theirs) in zip(model.named_modules(), fresh.named_modules(), strict=True):
        assert inspect.signature(ours.forward) == inspect.signature(theirs.forward), name


@pytest.mark.parametrize("first", [build.HIDDEN, 8], ids=["as long as the model is wide", "shorter"])
def test_a_length_that_equals_a_width_is_a_length(first: int) -> None:
    """Other lengths run in the same graphs."""
    model = captured_for("plain")
    step(model, tokens(length=first))
    found = len(graphs())
    step(model, tokens(length=first + 5))
    assert len(graphs()) == found == EXPECTED
