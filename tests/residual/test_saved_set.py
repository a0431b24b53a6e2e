"""What fused ops save: the floors of DESIGN section 9, per rule; and that backwards read that and nothing else."""

from __future__ import annotations

import pytest
import torch

from fxfuse.derivation import cotangent_name, derive_backward
from fxfuse.program import Program
from fxfuse.reference import execute
from fxfuse.residuals import plan_residuals, saved_names
from tests.gradient.row_programs import (
    PROGRAMS,
    Rows,
    cross_entropy,
    float64,
    layer_norm,
    qk_norm_rope,
    residual_norm,
    rms_norm,
    rope,
    softmax,
    softmax_by_hand,
    swiglu,
    tensors,
)


def planned(program: Program) -> tuple[Program, Program, tuple[str, ...]]:
    """Forward with its statistics, its backward, and what that reads besides cotangents."""
    wanted = tuple(a.name for a in program.arguments if a.kind == "real")
    forward = plan_residuals(program, wanted)
    saved = saved_names(forward, wanted)
    backward = derive_backward(forward, tuple(o.name for o in program.outputs), wanted, saved)
    return forward, backward, saved


def relu_squared(dtype: str) -> Program:
    b = Rows(2)
    a = b.axis(None, "a")
    b.store("y", dtype, b.apply("square", b.cast(dtype, b.apply("relu", b.whole("x", a, dtype)))), a)
    return b.build()


def relu(dtype: str) -> Program:
    b = Rows(2)
    a = b.axis(None, "a")
    b.store("y", dtype, b.apply("relu", b.whole("x", a, dtype)), a)
    return b.build()


FLOORS = {
    "rms_norm": (rms_norm, {"x", "w", "s_0"}),
    "layer_norm": (layer_norm, {"x", "w", "s_0", "s_1"}),  # mean and rstd
    "residual_norm": (residual_norm, {"h", "w", "s_0"}),  # the new residual, not its two summands
    "qk_norm_rope": (qk_norm_rope, {"x", "w", "cos", "sin", "s_0"}),
    "rope": (rope, {"x", "cos", "sin"}),  # x for the gradients of cos and sin
    "swiglu": (swiglu, {"gate", "up"}),
    "softmax": (softmax, {"y"}),
    "softmax_by_hand": (softmax_by_hand, {"x", "s_0", "s_1"}),
    "cross_entropy": (cross_entropy, {"x", "label", "s_0"}),
    "relu": (relu, {"y"}),
    "relu_squared": (relu_squared, {"x"}),
}


@pytest.mark.parametrize("name", FLOORS)
def test_saves_the_floor_and_nothing_else(name: str) -> None:
    build, floor = FLOORS[name]
    _, backward, saved = planned(build("bfloat16"))
    assert set(saved) == floor
    assert {a.name for a in backward.arguments if not a.name.startswith("g_")} == floor


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_backward_reads_what_is_named_and_no_reduction_twice(name: str) -> None:
    _, backward, saved = planned(PROGRAMS[name])
    assert {a.name for a in backward.arguments if not a.name.startswith("g_")} <= set(saved)
    assert "logsumexp" not in [node.op for node in backward.nodes]
    assert "max" not in [node.op for node in backward.nodes]


@pytest.mark.parametrize(("name", "statistic"), [
    ("rms_norm", "rsqrt"), ("residual_norm", "rsqrt"), ("qk_norm_rope", "rsqrt"), ("cross_entropy", "logsumexp")])
def test_the_statistic_is_the_last_of_its_chain(name: str, statistic: str) -> None:
    forward, _, _ = planned(PROGRAMS[name])
    stats = [o for o in forward.outputs if o.name.startswith("s_")]
    assert [str(o).split(" = ")[0] for o in stats] == ["s_0 : float32[r,r|]"]
    assert forward.nodes[stats[0].stores[0][0]].op == statistic


@pytest.mark.parametrize("name", PROGRAMS)
def test_gradients_from_saved_values_agree_with_autograd(name: str) -> None:
    program = float64(PROGRAMS[name])
    forward, backward, _ = planned(program)
    named = tensors(forward)
    outputs = dict(zip([o.name for o in forward.outputs], execute(forward, list(named.values())), strict=True))
    cotangents = {cotangent_name(o.name): torch.randn_like(outputs[o.name]) for o in program.outputs}
    expected = torch.autograd.grad([outputs[o.name] for o in program.outputs],
                                   [t for t in named.values() if t.requires_grad], list(cotangents.values()))
    known = {**named, **{n: y.detach() for n, y in outputs.items()}, **cotangents}
    for got, reference in zip(execute(backward, [known[a.name] for a in backward.arguments]), expected, strict=True):
        torch.testing.assert_close(got, reference, rtol=1e-11, atol=1e-12 * float(reference.abs().max() + 1))


def test_frozen_weights_need_less() -> None:
    forward = plan_residuals(rms_norm("bfloat16"), ("x",))
    assert saved_names(forward, ("x",)) == ("x", "w", "s_0")
    assert saved_names(rope("bfloat16"), ("x",)) == ("cos", "sin")  # rotary embedding of constants saves no activation


def test_what_lives_anyway_is_preferred() -> None:
    """h = x + r costs one tensor; where x and r are saved by others, it is computed again from them."""
    program = residual_norm("bfloat16")
    wanted = ("x", "r", "w")
    assert set(saved_names(program, wanted, lives=frozenset({"x", "r"}))) >= {"x", "r"}


def test_nothing_wanted_saves_nothing() -> None:
    assert plan_residuals(rms_norm(), ()) == rms_norm()
    assert saved_names(rms_norm(), ()) == ()


def test_a_backward_plans_its_own_statistics_under_fresh_names() -> None:
    _, backward, _ = planned(rms_norm())
    wanted = tuple(a.name for a in backward.arguments)
    names = [o.name for o in plan_residuals(backward, wanted).outputs]
    assert "s_0" not in names  # an argument of the backward
    assert len(set(names)) == len(names)
