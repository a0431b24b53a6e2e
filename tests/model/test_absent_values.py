"""What a graph holds none of: a pass that looks for it changes what torch's would, and settings are what torch reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._decomp.decompositions_for_rng import PhiloxState, PhiloxStateTracker
from torch._dynamo import config as dynamo_config
from torch._functorch import config as functorch_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental import _config as shape_config
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._config_module import ConfigModule

from fxfuse.capture import absent_values, quick_settings


def unused(x: Tensor) -> Tensor:
    y = x * x.shape[0]
    (y + 1).sum()
    torch.rand(2)  # (changes the state of the generator)
    return y


def by_a_float(x: Tensor) -> Tensor:
    return x * (x.shape[0] / 3)


def traced(function: Any) -> tuple[fx.GraphModule, Any, FakeTensorMode]:
    gm = make_fx(function, tracing_mode="symbolic")(torch.randn(5, 4))
    with gm.graph.inserting_before(gm.graph.output_node()):
        gm.graph.call_function(torch.ops.aten.neg.default, (gm.graph.find_nodes(op="placeholder")[0],))
    node = next(node for node in gm.graph.nodes if "val" in node.meta and isinstance(node.meta["val"], Tensor))
    mode = node.meta["val"].fake_mode
    return gm, mode.shape_env, mode


@pytest.mark.parametrize(("function", "looked_for"), [(unused, 0), (by_a_float, 1)])
def test_sizes_that_are_floats(function: Any, looked_for: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, env, mode = traced(function)
    absent_values._of_torch(wanted, env, mode)
    asked: list[Any] = []
    of_torch = absent_values._of_torch
    monkeypatch.setattr(absent_values, "_of_torch", lambda *given: asked.append(given) or of_torch(*given))
    found, env, mode = traced(function)
    absent_values.tensorify_python_scalars(found, env, mode)
    assert len(asked) == looked_for
    assert [(node.name, node.target) for node in found.graph.nodes] == [(node.name, node.target) for node in wanted.graph.nodes]


def test_no_state_of_a_generator_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = []
    for reset in (PhiloxState.reset, absent_values.reset):
        monkeypatch.setattr(PhiloxState, "reset", reset)
        with PhiloxStateTracker():
            state = PhiloxState()
            with pytest.raises(AssertionError, match="must not be empty"):
                state.validate_state()
            names = sorted(name for name in vars(state) if name not in ("seed", "base_offset"))
            facts.append(({name: vars(state)[name] for name in names}, state.seed.numel(), state.base_offset.numel()))
            given = torch.tensor(3), torch.tensor(4)
            PhiloxStateTracker.record_state(*given, "forward")
            assert PhiloxStateTracker.fwd_state.seed is given[0]
    assert facts[0] == facts[1]


@pytest.mark.skipif(not quick_settings.SETTINGS, reason="this torch keeps settings apart by context")
@pytest.mark.parametrize("module", [dynamo_config, functorch_config, shape_config], ids=lambda module: module.__name__)
def test_settings_are_what_torch_reads(module: Any) -> None:
    def read_all() -> dict[str, Any]:
        return {name: ask(module, name) for name in module._config if not module._config[name].hide}

    ask = ConfigModule.__getattr__
    wanted = read_all()
    ask = quick_settings.read
    assert read_all() == wanted


def test_settings_that_change(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name, value in quick_settings.SETTINGS:
        monkeypatch.setattr(owner, name, value)
    before = dynamo_config.specialize_float
    with dynamo_config.patch(specialize_float=not before):
        assert dynamo_config.specialize_float is not before
    assert dynamo_config.specialize_float is before
    with pytest.raises(AttributeError, match="no_setting does not exist"):
        dynamo_config.no_setting  # noqa: B018
    assert not hasattr(dynamo_config, "no_setting")
    assert dynamo_config.ignore_logging_functions is dynamo_config.ignore_logging_functions  # (a set that may be added to)
