"""Derived backward programs against torch autograd of the reference, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxfuse.derivation import cotangent_name, derive_backward
from fxfuse.errors import DerivationError
from fxfuse.program import Lane, Program, ProgramBuilder, parse
from fxfuse.reference import execute
from tests.gradient.row_programs import PROGRAMS, Rows, cross_entropy, float64, rms_norm, tensors


def run(program: Program, named: dict[str, Tensor]) -> dict[str, Tensor]:
    results = execute(program, [named[a.name] for a in program.arguments])
    return {o.name: r for o, r in zip(program.outputs, results, strict=True)}


def real_names(program: Program) -> tuple[str, ...]:
    return tuple(a.name for a in program.arguments if a.kind == "real")


def assert_agrees(got: Tensor, expected: Tensor, what: str) -> None:
    """Equal to float64 rounding, relative to the size of the whole tensor."""
    assert got.shape == expected.shape, what
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12 * max(1.0, float(expected.abs().max())), msg=what)


def assert_derivative(program: Program, named: dict[str, Tensor], saved: tuple[str, ...] = ()) -> Program:
    """The derived backward gives the gradients that autograd gives; returns it."""
    outputs = run(program, named)
    wanted = real_names(program)
    cotangents = {cotangent_name(n): torch.randn_like(y) for n, y in outputs.items()}
    reached = {name: y for name, y in outputs.items() if y.requires_grad}  # not those that are constant
    expected = torch.autograd.grad(list(reached.values()), [named[n] for n in wanted],
                                   [cotangents[cotangent_name(name)] for name in reached],
                                   allow_unused=True, materialize_grads=True)
    backward = derive_backward(program, tuple(outputs), wanted, saved or None)
    assert parse(str(backward)) == backward
    got = run(backward, {**named, **cotangents, **{n: outputs[n].detach() for n in saved}})
    for name, gradient, reference in zip(wanted, got.values(), expected, strict=True):
        assert_agrees(gradient, reference, f"d_{name}")
    return backward


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("name", PROGRAMS)
def test_derivative_agrees_with_autograd(name: str, scale: float) -> None:
    program = float64(PROGRAMS[name])
    assert_derivative(program, tensors(program, scale))


@pytest.mark.parametrize("name", PROGRAMS)
def test_derivative_of_the_derivative_agrees_with_autograd(name: str) -> None:
    program = float64(PROGRAMS[name])
    named = tensors(program)
    outputs = tuple(o.name for o in program.outputs)
    backward = derive_backward(program, outputs, real_names(program), None)
    named |= {cotangent_name(o): g for o, g in zip(outputs, map(torch.randn_like, run(program, named).values()), strict=True)}
    named = {n: t.detach().requires_grad_(t.is_floating_point()) for n, t in named.items()}
    assert_derivative(backward, named)


@pytest.mark.parametrize("name", ["rms_norm", "softmax", "cross_entropy"])
def test_third_derivative_agrees_with_autograd(name: str) -> None:
    program = float64(PROGRAMS[name])
    first = derive_backward(program, tuple(o.name for o in program.outputs), real_names(program), None)
    second = derive_backward(first, tuple(o.name for o in first.outputs), real_names(first), None)
    named = tensors(second)
    assert_derivative(second, named)


def test_text_is_the_same_every_time() -> None:
    texts = set()
    for _ in range(2):
        derive_backward.cache_clear()
        texts.add(str(derive_backward(rms_norm("bfloat16"), ("y",), ("x", "w"), None)))
    assert len(texts) == 1


def test_types_and_shapes_of_the_backward_are_those_of_the_forward() -> None:
    backward = derive_backward(rms_norm("bfloat16"), ("y",), ("x", "w"), None)
    assert [str(a) for a in backward.arguments] == ["x : bfloat16[r,r|a]", "w : bfloat16[1,1|a]", "g_y : bfloat16[r,r|a]"]
    assert [str(o).split(" = ")[0] for o in backward.outputs] == ["d_x : bfloat16[r,r|a]", "d_w : bfloat16[1,1|a]"]


def test_only_what_is_wanted_is_computed() -> None:
    backward = derive_backward(rms_norm(), ("y",), ("w",), None)
    assert [o.name for o in backward.outputs] == ["d_w"]
    assert "w" not in backward.argument_index  # dy/dw does not need w


def test_columns_that_nobody_reads_have_zero_gradient() -> None:
    program = float64(PROGRAMS["rope_of_a_slice"])
    backward = assert_derivative(program, tensors(program))
    columns = {c for o in backward.outputs if o.name == "d_x" for _, lane in o.stores if lane is not None
               for c in range(lane.offset, lane.offset + lane.stride * (backward.width(lane.axis) or 0), lane.stride)}
    assert columns == set(range(11))


def test_an_argument_without_influence_has_zero_gradient() -> None:
    b = Rows(2)
    a = b.axis(None, "a")
    x, y = b.whole("x", a, "float64"), b.whole("y", a, "float64")
    b.store("p", "float64", b.apply("exp", x), a)
    b.store("q", "float64", b.apply("exp", y), a)
    program = b.build()
    named = tensors(program)
    backward = derive_backward(program, ("p",), ("x", "y"), None)
    got = run(backward, {**named, "g_p": torch.ones(3, 4, 7, dtype=torch.float64)})
    assert_agrees(got["d_y"], torch.zeros_like(named["y"]), "d_y")


def test_the_domain_survives_when_no_value_needs_its_sizes() -> None:
    """d/dx of a sum over rows is a broadcast: the backward keeps an argument that says how many rows there are."""
    b = ProgramBuilder(2)
    a = b.axis(None, "a")
    b.argument("x", "float64", (True, True), a)
    b.output("total", "float64", (False, False), a, ((b.load("x", Lane(a)), Lane(a)),))
    program = b.build()
    backward = assert_derivative(program, tensors(program))
    assert "x" in backward.argument_index


def test_an_integer_has_no_gradient() -> None:
    with pytest.raises(DerivationError, match=r"label.*int64"):
        derive_backward(cross_entropy(), ("loss",), ("label",), None)
    with pytest.raises(DerivationError, match="no output 'nothing'"):
        derive_backward(cross_entropy(), ("nothing",), ("x",), None)


# Stability: float32 against float64, where naive formulas overflow.

def gradient_of_x(program: Program, **named: Tensor) -> Tensor:
    cotangents = tuple(o.name for o in program.outputs)
    return run(derive_backward(program, cotangents, ("x",), None), named)["d_x"]


def pointwise(function: str, dtype: str = "float32") -> Program:
    b = Rows(2)
    a = b.axis(None, "a")
    b.store("y", dtype, b.apply(function, b.whole("x", a, dtype)), a)
    return b.build()


@pytest.mark.parametrize("function", ["sigmoid", "tanh", "softplus", "erf", "relu", "abs"])
def test_saturated_functions_have_finite_gradients(function: str) -> None:
    x = torch.tensor([[[-1000.0, -100.0, -20.0, 0.0, 20.0, 100.0, 1000.0]]], requires_grad=True)
    got = gradient_of_x(pointwise(function), x=x.detach(), g_y=torch.ones(1, 1, 7))
    expected, = torch.autograd.grad(execute(pointwise(function, "float64"), [x.double()])[0].sum(), x)
    assert got.isfinite().all()
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=6e-8)  # 1 - y, y in float32


def test_silu_far_out_is_finite() -> None:
    program = PROGRAMS["swiglu"]
    gate = torch.tensor([[[-1000.0, -100.0, 100.0, 1000.0, 0.0]]])
    backward = derive_backward(program, ("y",), ("gate", "up"), None)
    got = run(backward, {"gate": gate, "up": torch.ones_like(gate), "g_y": torch.ones_like(gate)})
    assert got["d_gate"].tolist() == [[[0.0, 0.0, 1.0, 1.0, 0.5]]]


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "l2_norm"])
def test_norms_of_tiny_and_of_zero_rows_have_finite_gradients(name: str) -> None:
    program = PROGRAMS[name]
    named = tensors(program, grad=False)
    scales = torch.tensor([1e-12, 1e-6, 1e-3, 1.0]).reshape(1, 4, 1)
    named["x"] = named["x"] * scales
    named["g_y"] = torch.randn(3, 4, 7)
    exact = gradient_of_x(float64(program), **{n: t.double() for n, t in named.items()})
    torch.testing.assert_close(gradient_of_x(program, **named).double(), exact, rtol=1e-3, atol=0.0)


def test_cross_entropy_with_impossible_classes_and_ignored_rows() -> None:
    program = cross_entropy()
    x = torch.randn(1, 3, 7)
    x[..., 4:] = -torch.inf
    label = torch.tensor([[[2], [-100], [0]]])
    got = gradient_of_x(program, x=x, label=label, g_loss=torch.ones(1, 3, 1))
    expected = torch.softmax(x.double(), -1) - torch.nn.functional.one_hot(label.clamp(min=0)[..., 0], 7)
    expected[:, 1] = 0
    assert got[0, 1].tolist() == [0.0] * 7  # exactly
    assert got[..., 4:].abs().max() == 0
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-7)


def test_maximum_of_a_row_shares_ties() -> None:
    b = Rows(2)
    a = b.axis(None, "a")
    b.store("m", "float64", b.reduce("max", a, b.whole("x", a, "float64")), None)
    x = torch.tensor([[[1.0, 3.0, 3.0, 2.0]]], dtype=torch.float64, requires_grad=True)
    assert_derivative(b.build(), {"x": x})


# Random programs.

SMOOTH = ("neg", "square", "exp", "sin", "cos", "tanh", "erf", "sigmoid", "softplus")
BINARY = ("add", "sub", "mul", "maximum", "minimum")


@st.composite
def random_programs(draw: st.DrawFn) -> Program:
    """Pointwise chains over two lanes of x, a column and a row operand, with reductions in between."""
    b = Rows(2)
    a = b.axis(3, "a")
    b.argument("x", "float64", (True, True), draw(st.sampled_from([6, 8])))
    b.argument("row", "float64", (True, False), None)
    values = [b.load("x", Lane(a, 0)), b.load("x", Lane(a, 3)), b.whole("w", a, "float64", (False, False)),
              b.load("row", None), b.const(draw(st.sampled_from([-1.0, 0.5, 1.0, 2.0])))]
    for _ in range(draw(st.integers(2, 10))):
        pick = st.sampled_from(values)
        kind = draw(st.sampled_from(["unary", "binary", "reduce", "select"]))
        if kind == "unary":
            # tanh first: random chains of exp and square must stay in range
            values.append(b.apply(draw(st.sampled_from(SMOOTH)), b.apply("tanh", draw(pick))))
        elif kind == "binary":
            values.append(b.apply(draw(st.sampled_from(BINARY)), draw(pick), draw(pick)))
        elif kind == "select":
            values.append(b.apply("select", b.apply("lt", draw(pick), draw(pick)), draw(pick), draw(pick)))
        else:
            x = draw(st.sampled_from(values[:3]))
            wide = b.apply("mul", b.apply("tanh", draw(pick)), x)
            values.append(b.reduce(draw(st.sampled_from(["sum", "max", "logsumexp"])), a, wide))
    b.output("y", "float64", (True, True), 6, ((values[-1], Lane(a, 0)), (values[-2], Lane(a, 3))))
    b.output("total", "float64", (False, True), a, ((values[-1], Lane(a)),))
    return b.build()


@given(random_programs(), st.sampled_from([(1, 1), (2, 3), (3, 1)]), st.integers(0, 2**16))
def test_random_programs_agree_with_autograd(program: Program, leading: tuple[int, int], seed: int) -> None:
    torch.manual_seed(seed)
    if program.arguments:
        assert_derivative(program, tensors(program, leading=leading))


@given(random_programs(), st.integers(0, 2**16))
def test_random_programs_read_saved_outputs(program: Program, seed: int) -> None:
    torch.manual_seed(seed)
    if program.arguments:
        assert_derivative(program, tensors(program), saved=("y",))
