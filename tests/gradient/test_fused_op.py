"""The fused op is a good citizen of torch: opcheck, any order of derivative, vmap, autocast, fake tensors, errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fxfuse.errors import UnsupportedGraph
from fxfuse.fused_op import check_tensors, rows
from fxfuse.program import Lane, Program, ProgramBuilder, parse
from fxfuse.residuals import plan_residuals


def rms_norm(dtype: str = "float32", rank: int = 2) -> Program:
    """y = x / rms(x) * w, with its statistic."""
    b = ProgramBuilder(rank)
    a = b.axis(None, "a")
    b.argument("x", dtype, (True,) * rank, a)
    b.argument("w", dtype, (False,) * rank, a)
    x, w = b.load("x", Lane(a)), b.load("w", Lane(a))
    mean = b.apply("div", b.reduce("sum", a, b.apply("square", x)), b.width(a))
    normed = b.apply("mul", x, b.apply("rsqrt", b.apply("add", mean, b.const(1e-6))))
    b.output("y", dtype, (True,) * rank, a, ((b.apply("mul", normed, w), Lane(a)),))
    return plan_residuals(b.build(), ("x", "w"))


def gate(dtype: str = "float32", rank: int = 2) -> Program:
    """y = silu(g) * u."""
    b = ProgramBuilder(rank)
    a = b.axis(None, "a")
    for name in ("g", "u"):
        b.argument(name, dtype, (True,) * rank, a)
    g, u = b.load("g", Lane(a)), b.load("u", Lane(a))
    b.output("y", dtype, (True,) * rank, a, ((b.apply("mul", b.apply("mul", g, b.apply("sigmoid", g)), u), Lane(a)),))
    return b.build()


def add_rms_norm() -> Program:
    """h = x + r and the norm of h, both outputs; the row sums of h are not differentiated apart."""
    b = ProgramBuilder(2)
    a = b.axis(None, "a")
    b.argument("x", "float64", (True, True), a)
    b.argument("r", "float64", (True, True), a)
    h = b.apply("add", b.load("x", Lane(a)), b.load("r", Lane(a)))
    mean = b.apply("div", b.reduce("sum", a, b.apply("square", h)), b.width(a))
    b.output("h", "float64", (True, True), a, ((h, Lane(a)),))
    b.output("y", "float64", (True, True), a, ((b.apply("mul", h, b.apply("rsqrt", mean)), Lane(a)),))
    return plan_residuals(b.build(), ("x", "r"))


def inputs(program: Program, *sizes: int, grad: bool = True) -> list[Tensor]:
    """Random arguments: leading sizes, then columns."""
    made = []
    for argument in program.arguments:
        shape = [n if varies else 1 for n, varies in zip(sizes[:-1], argument.rows, strict=True)]
        made.append(torch.randn(*shape, sizes[-1], dtype=getattr(torch, argument.dtype), requires_grad=grad))
    return made


@pytest.mark.parametrize("make", [rms_norm, gate, add_rms_norm], ids=lambda f: f.__name__)
def test_opcheck_finds_nothing(make: Callable[[], Program]) -> None:
    program = make()
    torch.library.opcheck(rows, (inputs(program, 2, 3, 8), str(program)))


@pytest.mark.parametrize("make", [rms_norm, gate], ids=lambda f: f.__name__)
def test_opcheck_finds_nothing_in_the_backward(make: Callable[[], Program]) -> None:
    from fxfuse.fused_op import backward_of

    program = make()
    backward = parse(backward_of(str(program), ("y",), tuple(a.name for a in program.arguments)).program or "")
    named = {a.name: t for a, t in zip(program.arguments, inputs(program, 2, 3, 8), strict=True)}
    named |= {o.name: t.detach().requires_grad_() for o, t in
              zip(program.outputs, rows(list(named.values()), str(program)), strict=True)}
    tensors = [named.get(a.name, torch.randn(2, 3, 8, requires_grad=True)) for a in backward.arguments]
    torch.library.opcheck(rows, (tensors, str(backward)))


@pytest.mark.parametrize("make", [rms_norm, gate], ids=lambda f: f.__name__)
def test_first_and_second_derivatives(make: Callable[[str], Program]) -> None:
    program = make("float64")

    def f(*tensors: Tensor) -> Tensor:
        return rows(list(tensors), str(program))[0]

    tensors = inputs(program, 2, 2, 4)
    assert torch.autograd.gradcheck(f, tensors)
    assert torch.autograd.gradgradcheck(f, tensors)


def test_third_derivative() -> None:
    program = gate("float64")
    g, u = inputs(program, 1, 1, 5)
    y = rows([g, u], str(program))[0]
    reference = torch.nn.functional.silu(g) * u
    for value in (0, 1, 2):
        y, = torch.autograd.grad(y.sum(), g, create_graph=True)
        reference, = torch.autograd.grad(reference.sum(), g, create_graph=True)
        torch.testing.assert_close(y, reference, rtol=1e-10, atol=1e-12, msg=f"derivative {value + 1}")


def test_both_outputs_have_gradients_and_either_may_be_missing() -> None:
    program = add_rms_norm()

    def both(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        h, y, *_ = rows([x, r], str(program))
        return h, y

    tensors = inputs(program, 2, 2, 4)
    assert torch.autograd.gradcheck(both, tensors)
    assert torch.autograd.gradcheck(lambda x, r: both(x, r)[0], tensors)
    assert torch.autograd.gradcheck(lambda x, r: both(x, r)[1], tensors)
    assert torch.autograd.gradgradcheck(both, tensors)


def test_a_gradient_has_the_shape_its_tensor_was_given_in() -> None:
    """The weight comes as [columns], the program broadcasts it over all rows."""
    program = rms_norm()
    x, w = torch.randn(2, 3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    rows([x, w], str(program))[0].sum().backward()
    assert w.grad is not None
    assert w.grad.shape == (8,)
    assert x.grad is not None
    assert x.grad.shape == (2, 3, 8)


def test_only_wanted_gradients_are_computed() -> None:
    program = rms_norm()
    x, w = inputs(program, 2, 3, 8)
    rows([x, w.detach()], str(program))[0].sum().backward()
    assert x.grad is not None
    assert w.grad is None


def test_what_is_saved_is_what_the_backward_reads() -> None:
    program = rms_norm("bfloat16")
    x, w = inputs(program, 2, 3, 64)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y, rstd = rows([x, w], str(program))
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), w.data_ptr(), rstd.data_ptr()}
    del y


def test_vmap_is_one_more_dimension_of_rows() -> None:
    program = rms_norm("float64")
    x, w = torch.randn(5, 2, 3, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)

    def f(x: Tensor, w: Tensor) -> Tensor:
        return rows([x, w], str(program))[0]

    one_by_one = torch.stack([f(a, b) for a, b in zip(x, w, strict=True)])
    torch.testing.assert_close(torch.vmap(f)(x, w), one_by_one, rtol=1e-12, atol=0)
    shared = torch.stack([f(a, w[0]) for a in x])
    torch.testing.assert_close(torch.vmap(f, in_dims=(0, None))(x, w[0]), shared, rtol=1e-12, atol=0)
    last = torch.vmap(f, in_dims=(3, None))(x.permute(1, 2, 3, 0), w[0])
    torch.testing.assert_close(last, shared, rtol=1e-12, atol=0)


def test_autocast_changes_no_dtype() -> None:
    program = gate("float32")
    tensors = inputs(program, 2, 3, 8)
    plain = rows(tensors, str(program))[0]
    with torch.autocast("cpu", torch.bfloat16):
        cast = rows(tensors, str(program))[0]
    assert cast.dtype == torch.float32
    assert torch.equal(plain, cast)


def test_repeats_bit_for_bit() -> None:
    program = rms_norm("bfloat16")
    x, w = inputs(program, 4, 33, 96)

    def step() -> list[Tensor]:
        y = rows([x, w], str(program))[0]
        return [y, *torch.autograd.grad(y.float().square().sum(), [x, w])]

    assert all(torch.equal(a, b) for a, b in zip(step(), step(), strict=True))


def test_no_rows_at_all() -> None:
    program = rms_norm()
    x, w = torch.randn(2, 0, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    y = rows([x, w], str(program))[0]
    y.sum().backward()
    assert y.shape == (2, 0, 8)
    assert w.grad is not None
    assert torch.equal(w.grad, torch.zeros(8))


def test_layout_follows_the_input() -> None:
    """A transposed query stays transposed: nothing is copied, before or after."""
    program = gate()
    g = torch.randn(2, 8, 3, 4).transpose(1, 2)[:, :, 0]
    assert rows([g, g], str(program))[0].stride() == torch.empty_like(g).stride()


def test_symbolic_sizes() -> None:
    program = rms_norm()
    text = str(program)
    counter = CompileCounterWithBackend("aot_eager")
    f = torch.compile(lambda x, w: rows([x, w], text)[0] * 2, backend=counter, dynamic=True, fullgraph=True)
    for n in (3, 5, 17):
        x, w = torch.randn(2, n, 8, requires_grad=True), torch.randn(8, requires_grad=True)
        ours, = torch.autograd.grad(f(x, w).sum(), x)
        eager, = torch.autograd.grad((rows([x, w], str(program))[0] * 2).sum(), x)
        torch.testing.assert_close(ours, eager, rtol=1e-6, atol=1e-7)
    assert counter.frame_count == 1


@pytest.mark.parametrize(("tensors", "message"), [
    ([torch.randn(2, 3, 8)], "takes 2 tensors, not 1"),
    ([torch.randn(2, 3, 8), torch.randn(2, 3, 8).half()], "argument 'u' is torch.float16, the program was made for float32"),
    ([torch.randn(2, 3, 8), torch.randn(2, 3, 8).to_sparse()], "argument 'u' is a Tensor; fused ops take plain tensors"),
], ids=["count", "dtype", "layout"])
def test_wrong_tensors_are_named(tensors: list[Tensor], message: str) -> None:
    with pytest.raises(UnsupportedGraph, match=message):
        check_tensors(gate(), tensors)


def test_out_of_range_labels_raise_as_eager_does() -> None:
    b = ProgramBuilder(1)
    a = b.axis(None, "a")
    b.argument("x", "float32", (True,), a)
    b.argument("label", "int64", (True,), None)
    index = b.check_index(a, b.load("label", None))
    zero = b.const(0.0)
    picked = b.reduce("sum", a, b.apply("select", b.apply("eq", b.iota(a), index), b.load("x", Lane(a)), zero))
    b.output("y", "float32", (True,), None, ((picked, None),))
    x, labels = torch.randn(3, 5), torch.tensor([[0], [5], [1]])
    with pytest.raises(IndexError, match="Target 5 is out of bounds"):
        rows([x, labels], str(b.build()))
