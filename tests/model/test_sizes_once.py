"""Symbolic sizes are computed with once for a graph, with the results that torch computes anew each time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
    guard_or_false,
    guard_or_true,
)

from fxfuse.capture import sizes_once


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name, value in sizes_once.SETTINGS:
        monkeypatch.setattr(owner, name, value)


def sizes() -> torch.Size:
    """Three symbolic ones, of 5, 7 and 11."""
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 3)
    return FakeTensorMode(shape_env=ShapeEnv()).from_tensor(torch.empty(5, 7, 11), symbolic_context=context).shape


def results(a: torch.SymInt, b: torch.SymInt) -> list[str]:
    """What torch makes of two sizes, of one and numbers, and of truths about sizes."""
    pairs = [(a, b), (b, a), (a, 1), (1, a), (a, a), (a, 5), (2 * a, b + 3)]
    truths = [(a < b, b > 3), (a == 2 * b, a < b)]
    found = []
    for name in sizes_once.OPERATIONS:
        for x, y in truths if name in ("and_", "or_") else pairs:
            left, right = (value.node if not isinstance(value, int) else a.node.wrap_int(value) for value in (x, y))
            found += [getattr(left, name)(right)]
    return [f"{node.expr} {node.pytype} {node.hint} {node.maybe_as_int() if node.pytype is int else ''}" for node in found]


def test_results_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = results(*sizes()[:2])
    for owner, name, value in sizes_once.SETTINGS:
        monkeypatch.setattr(owner, name, value)
    a, b, _ = sizes()
    assert results(a, b) == results(a, b) == wanted
    assert (a * b).node is not (a * b).node  # tracers tell them apart
    assert (a * b).node._expr is (a * b).node._expr


@pytest.mark.usefixtures("once")
def test_what_is_learnt_later_holds() -> None:
    a, b, c = sizes()
    same, both = (a + 2 == b).node, (a * c).node
    assert bool(a + 2 == b)  # from now on b is written as a + 2
    assert str(same.expr) == "True"
    assert (a + 2 == b).node.expr == same.expr
    assert str((b * c).node.expr) != str(both.expr)
    assert (b * c).node.hint == 77


@pytest.mark.usefixtures("once")
def test_environments_are_apart() -> None:
    (a, *_), (b, *_) = sizes(), sizes()
    assert str(a) == str(b)
    assert (a * 2).node.shape_env is not (b * 2).node.shape_env


def scaled(x: Tensor) -> Tensor:
    rows = x.shape[0] * x.shape[1]
    return x.view(rows, x.shape[2]) * (x.shape[0] * x.shape[1])


def test_a_tracer_records_what_it_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    code = make_fx(scaled, tracing_mode="symbolic")(torch.randn(2, 3, 5)).code
    for owner, name, value in sizes_once.SETTINGS:
        monkeypatch.setattr(owner, name, value)
    assert make_fx(scaled, tracing_mode="symbolic")(torch.randn(2, 3, 5)).code == code


@pytest.mark.usefixtures("once")
def test_a_size_that_turns_out_to_be_a_number_is_one() -> None:
    a, b, _ = sizes()
    total = (a + b).node
    assert total.maybe_as_int() is None
    assert (a + b).node.maybe_as_int() is None
    assert bool(a == 5)  # from now on it is
    assert bool(b == 7)
    assert total.maybe_as_int() == (a + b).node.maybe_as_int() == 12
    assert str(total.expr) == "12"
    assert a.node.wrap_int(5).maybe_as_int() == 5


@pytest.mark.usefixtures("once")
def test_guards_are_torchs_and_plain_truths_are_none() -> None:
    a, b, _ = sizes()
    environment = a.node.shape_env
    before = len(environment.guards)
    assert guard_or_false(a * b != 0)
    assert guard_or_true(a > 0)
    assert not guard_or_false(a * b == -1)
    assert len(environment.guards) == before
    assert guard_or_false(a < b)
    assert guard_or_true(a < b)
    assert len(environment.guards) == before + 1
    assert guard_or_false(True)
    assert not guard_or_true(False)
