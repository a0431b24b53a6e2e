"""Row programs for the tests of the lowering: forwards built by hand, backwards derived from them, and inputs for both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxfuse import reference
from fxfuse.derivation import derive_backward
from fxfuse.program import Argument, Lane, Program, ProgramBuilder
from fxfuse.residuals import saved_names


class Build(ProgramBuilder):
    """A ProgramBuilder with the arithmetic spelled as functions of values."""

    def x(self, name: str, dtype: str, rows: tuple[bool, ...], axis: str | None) -> int:
        self.argument(name, dtype, rows, axis)
        return self.load(name, None if axis is None else Lane(axis))

    def __getattr__(self, function: str) -> Callable[..., int]:
        if function.startswith("__"):
            raise AttributeError(function)
        name = function.rstrip("_")
        return lambda *operands: self.apply(name, *(self.number(o) for o in operands))

    def number(self, operand: int | float) -> int:
        """Floats are constants, ints are values."""
        return self.const(operand) if isinstance(operand, float) else operand

    def mean(self, axis: str, value: int) -> int:
        return self.div(self.reduce("sum", axis, value), self.width(axis))

    def out(self, name: str, dtype: str, rows: tuple[bool, ...], value: int, axis: str | None) -> None:
        self.output(name, dtype, rows, axis, ((value, None if axis is None else Lane(axis)),))


ROW, ONE = (True,), (False,)


def of_width(program: Program, columns: int) -> Program:
    """The same program for rows of so many columns only, as what is captured of a model says."""
    return replace(program, axes=tuple((axis, columns) for axis, _ in program.axes)).verify()


def rms_norm(dtype: str = "bfloat16") -> Program:
    b = Build(1)
    a = b.axis(None, "a")
    x, w = b.x("x", dtype, ROW, a), b.x("w", dtype, ONE, a)
    rstd = b.rsqrt(b.add(b.mean(a, b.square(x)), 1e-6))
    b.out("y", dtype, ROW, b.mul(w, b.cast(dtype, b.mul(x, rstd))), a)
    b.out("rstd", "float32", ROW, rstd, None)
    return b.build()


def layer_norm(dtype: str = "bfloat16") -> Program:
    b = Build(1)
    a = b.axis(None, "a")
    x, w, bias = b.x("x", dtype, ROW, a), b.x("w", dtype, ONE, a), b.x("b", dtype, ONE, a)
    mean = b.mean(a, x)
    c = b.sub(x, mean)
    rstd = b.rsqrt(b.add(b.mean(a, b.square(c)), 1e-5))
    b.out("y", dtype, ROW, b.add(b.mul(b.mul(c, rstd), w), bias), a)
    b.out("mean", "float32", ROW, mean, None)
    b.out("rstd", "float32", ROW, rstd, None)
    return b.build()


def residual_norm(dtype: str = "bfloat16") -> Program:
    b = Build(1)
    a = b.axis(None, "a")
    x, r, w = b.x("x", dtype, ROW, a), b.x("r", dtype, ROW, a), b.x("w", dtype, ONE, a)
    h = b.cast(dtype, b.add(x, r))
    b.out("h", dtype, ROW, h, a)
    b.out("y", dtype, ROW, b.mul(w, b.cast(dtype, b.mul(h, b.rsqrt(b.add(b.mean(a, b.square(h)), 1e-6))))), a)
    return b.build()


def softmax(dtype: str = "bfloat16") -> Program:
    b = Build(1)
    a = b.axis(None, "a")
    x = b.x("x", dtype, ROW, a)
    b.out("y", dtype, ROW, b.exp(b.sub(x, b.reduce("logsumexp", a, x))), a)
    return b.build()


def shifted_softmax(dtype: str = "bfloat16") -> Program:
    """exp(x - max) / sum(exp(x - max)), as models' softmax becomes."""
    b = Build(1)
    a = b.axis(None, "a")
    x = b.x("x", dtype, ROW, a)
    e = b.exp(b.sub(x, b.stop(b.reduce("max", a, x))))
    b.out("y", dtype, ROW, b.div(e, b.reduce("sum", a, e)), a)
    return b.build()


def shifted_cross_entropy(dtype: str = "bfloat16") -> Program:
    """log(sum(exp(x - max))) - (x[label] - max), and a mean under the weights of the softmax."""
    b = Build(1)
    a = b.axis(None, "a")
    x, label, w = b.x("x", dtype, ROW, a), b.x("label", "int64", ROW, None), b.x("w", dtype, ONE, a)
    kept = b.ne(label, b.const(-100))
    index = b.check_index(a, b.select(kept, label, b.const(0)))
    peak = b.reduce("max", a, x)
    shifted = b.sub(x, b.stop(peak))
    e = b.exp(shifted)
    total = b.reduce("sum", a, e)
    logit = b.reduce("sum", a, b.select(b.eq(b.iota(a), index), shifted, 0.0))
    b.out("loss", "float32", ROW, b.select(kept, b.sub(b.log(total), logit), 0.0), None)
    b.out("peak", "float32", ROW, peak, None)
    b.out("total", "float32", ROW, total, None)
    b.out("weighted", "float32", ROW, b.reduce("sum", a, b.mul(e, w)), None)
    return b.build()


def row_peak(dtype: str = "bfloat16") -> Program:
    b = Build(1)
    a = b.axis(None, "a")
    x = b.x("x", dtype, ROW, a)
    peak = b.reduce("max", a, x)
    b.out("peak", "float32", ROW, peak, None)
    b.out("below", dtype, ROW, b.sub(x, peak), a)
    return b.build()


def cross_entropy(dtype: str = "bfloat16", smoothing: float = 0.0) -> Program:
    b = Build(1)
    a = b.axis(None, "a")
    x, label = b.x("x", dtype, ROW, a), b.x("label", "int64", ROW, None)
    kept = b.ne(label, b.const(-100))
    index = b.check_index(a, b.select(kept, label, b.const(0)))
    lse = b.reduce("logsumexp", a, x)
    logit = b.reduce("sum", a, b.select(b.eq(b.iota(a), index), x, 0.0))
    loss = b.sub(lse, logit)
    if smoothing:
        loss = b.add(b.mul(loss, 1 - smoothing), b.mul(b.sub(lse, b.mean(a, x)), smoothing))
    b.out("loss", "float32", ROW, b.select(kept, loss, 0.0), None)
    b.out("lse", "float32", ROW, lse, None)
    return b.build()


def swiglu(dtype: str = "bfloat16") -> Program:
    b = Build(1)
    a = b.axis(None, "a")
    gate, up = b.x("gate", dtype, ROW, a), b.x("up", dtype, ROW, a)
    b.out("y", dtype, ROW, b.mul(b.cast(dtype, b.mul(gate, b.sigmoid(gate))), up), a)
    return b.build()


def gelu(dtype: str = "bfloat16") -> Program:
    b = Build(1)
    a = b.axis(None, "a")
    x = b.x("x", dtype, ROW, a)
    b.out("y", dtype, ROW, b.mul(b.mul(0.5, x), b.add(1.0, b.erf(b.mul(x, 0.5**0.5)))), a)
    return b.build()


def packed_swiglu(dtype: str = "bfloat16", width: int = 24) -> Program:
    b = Build(1)
    a = b.axis(width, "a")
    b.argument("gate_up", dtype, ROW, 2 * width)
    gate, up = b.load("gate_up", Lane(a)), b.load("gate_up", Lane(a, width))
    b.out("y", dtype, ROW, b.mul(b.mul(gate, b.sigmoid(gate)), up), a)
    return b.build()


HEADS = (True, True, True)
SHARED = (True, False, True)


def rotary(dtype: str = "bfloat16", width: int = 16, step: int = 1, tail: int = 0) -> Program:
    """x [batch, heads, positions, width + tail] rotated by cos, sin [batch, 1, positions, width]: halves (step 1), pairs (step 2)."""
    b = Build(3)
    half = b.axis(width // 2, "half")
    first, second = (Lane(half, 0, step), Lane(half, width // 2 if step == 1 else 1, step))
    columns = width + tail
    b.argument("x", dtype, HEADS, columns)
    b.argument("cos", dtype, SHARED, width)
    b.argument("sin", dtype, SHARED, width)
    (x1, x2), (c1, c2), (s1, s2) = ([b.load(name, lane) for lane in (first, second)] for name in ("x", "cos", "sin"))
    stores = [(b.sub(b.mul(x1, c1), b.mul(x2, s1)), first), (b.add(b.mul(x2, c2), b.mul(x1, s2)), second)]
    if tail:
        rest = Lane(b.axis(tail, "tail"), width)
        stores.append((b.load("x", rest), rest))
    b.output("y", dtype, HEADS, columns, tuple(stores))
    return b.build()


def normed_rotary(dtype: str = "bfloat16", width: int = 16) -> Program:
    """QK-norm and half rotary in one pass: a reduction over both lanes of a head."""
    b = Build(3)
    half = b.axis(width // 2, "half")
    lanes = Lane(half), Lane(half, width // 2)
    none = (False, False, False)
    for name, rows in (("x", HEADS), ("w", none), ("cos", SHARED), ("sin", SHARED)):
        b.argument(name, dtype, rows, width)
    (x1, x2), (w1, w2), (c1, c2), (s1, s2) = ([b.load(n, lane) for lane in lanes] for n in ("x", "w", "cos", "sin"))
    total = b.add(b.reduce("sum", half, b.square(x1)), b.reduce("sum", half, b.square(x2)))
    rstd = b.rsqrt(b.add(b.div(total, float(width)), 1e-6))
    n1, n2 = b.mul(w1, b.cast(dtype, b.mul(x1, rstd))), b.mul(w2, b.cast(dtype, b.mul(x2, rstd)))
    b.output("y", dtype, HEADS, width, ((b.sub(b.mul(n1, c1), b.mul(n2, s1)), lanes[0]),
                                        (b.add(b.mul(n2, c2), b.mul(n1, s2)), lanes[1])))
    return b.build()


def bias_gradient(dtype: str = "bfloat16") -> Program:
    """A map, and the sum of an argument over rows, and a full sum to a scalar."""
    b = Build(1)
    a = b.axis(None, "a")
    g, x = b.x("g", dtype, ROW, a), b.x("x", dtype, ROW, a)
    b.out("d_x", dtype, ROW, b.mul(g, b.sub(1.0, b.square(b.tanh(x)))), a)
    b.out("d_b", "float32", ONE, g, a)
    b.out("d_scale", "float32", ONE, b.reduce("sum", a, b.mul(g, x)), None)
    return b.build()


def column_sums(dtype: str = "bfloat16") -> Program:
    b = Build(1)
    a = b.axis(None, "a")
    g = b.x("g", dtype, ROW, a)
    b.out("d_b", "float32", ONE, b.mul(g, 0.5), a)
    return b.build()


def functions(dtype: str = "float32") -> Program:
    """Every function of the table, applied where it is defined; one output for each."""
    b = Build(1)
    a = b.axis(None, "a")
    x, z = b.x("x", dtype, ROW, a), b.x("z", dtype, ROW, a)
    size = b.add(b.abs(x), 0.5)
    results = {
        "sum": b.add(x, z), "difference": b.sub(x, z), "ratio": b.div(x, size), "minus": b.neg(x), "power": b.pow(size, 0.3),
        "powers": b.pow(size, z), "inverse": b.reciprocal(size), "root": b.sqrt(size), "inverse_root": b.rsqrt(size),
        "exponential": b.exp(x), "logarithm": b.log(size), "log1p": b.log1p(size), "sine": b.sin(x), "cosine": b.cos(x),
        "tanh": b.tanh(x), "erf": b.erf(x), "sigmoid": b.sigmoid(x), "softplus": b.softplus(x), "relu": b.relu(x),
        "sign": b.sign(x), "low": b.clamp_min(x, -0.25), "high": b.clamp_max(x, 0.25), "larger": b.maximum(x, z),
        "smaller": b.minimum(x, z), "chosen": b.select(b.and_(b.lt(x, z), b.not_(b.ge(x, 0.5))), x, z),
        "counted": b.real(b.or_(b.gt(x, 0.0), b.le(z, 0.0))), "literals": b.select(b.ne(x, z), 0.1, -0.2),
        "position": b.mul(b.real(b.iota(a)), x), "wide": b.div(x, b.width(a)),
    }
    for name, value in results.items():
        b.out(name, dtype, ROW, value, a)
    return b.build()


@dataclass(frozen=True)
class Case:
    """A program and how to make its inputs. A backward case is derived from ``forward`` for the gradients ``wanted``."""

    name: str
    forward: Callable[[str], Program]
    wanted: tuple[str, ...] = ()

    def program(self, dtype: str) -> Program:
        forward = self.forward(dtype)
        if not self.wanted:
            return forward
        return derive_backward(forward, self.cotangents(forward), self.wanted, saved_names(forward, self.wanted))

    def cotangents(self, forward: Program) -> tuple[str, ...]:
        """Statistics (outputs without columns that only the backward reads) have no cotangent; a loss has."""
        return tuple(o.name for o in forward.outputs if o.columns is not None or o.name == "loss")

    def inputs(self, program: Program, leading: tuple[int, ...], columns: int, scale: float) -> list[Tensor]:
        """Random arguments of the forward; of the backward: these, what the forward gives for them, and random cotangents."""
        forward = program if not self.wanted else self.forward(_storage(program))
        tensors = {a.name: random_argument(a, leading, columns, scale) for a in forward.arguments}
        if not self.wanted:
            return list(tensors.values())
        results = reference.execute(forward, list(tensors.values()))
        tensors |= {o.name: result for o, result in zip(forward.outputs, results, strict=True)}
        return [tensors[a.name] if a.name in tensors else random_argument(a, leading, columns, 1.0) for a in program.arguments]


def _storage(program: Program) -> str:
    """The dtype that an instance was made for: that of its first argument with columns."""
    return next(a.dtype for a in program.arguments if a.kind == "real" and a.columns is not None)


def random_argument(argument: Argument, leading: tuple[int, ...], columns: int, scale: float) -> Tensor:
    """Normal with the scale where it varies over rows (tables and second operands: with scale 1), labels with some -100."""
    shape = [n if varies else 1 for n, varies in zip(leading, argument.rows, strict=True)]
    width = argument.columns if isinstance(argument.columns, int) else columns if argument.columns else 1
    if argument.kind == "int":
        labels = torch.randint(0, columns, (*shape, width), dtype=getattr(torch, argument.dtype))
        labels[torch.rand(labels.shape) < 0.2] = -100
        labels.view(-1)[1:2] = -100
        return labels
    own = scale if any(argument.rows) and argument.name not in ("cos", "sin", "z") else 1.0
    return (torch.randn(*shape, width) * own).to(getattr(torch, argument.dtype))


FORWARDS = (rms_norm, layer_norm, residual_norm, softmax, shifted_softmax, row_peak, cross_entropy, shifted_cross_entropy,
            swiglu, gelu, packed_swiglu, rotary, normed_rotary, bias_gradient, column_sums, functions)
CASES = [Case(f.__name__, f) for f in FORWARDS] + [
    Case("smoothed_cross_entropy", lambda dtype: cross_entropy(dtype, smoothing=0.1)),
    Case("interleaved_rotary", lambda dtype: rotary(dtype, step=2)),
    Case("partial_rotary", lambda dtype: rotary(dtype, tail=6)),
    Case("rms_norm_backward", rms_norm, ("x", "w")),
    Case("layer_norm_backward", layer_norm, ("x", "w", "b")),
    Case("residual_norm_backward", residual_norm, ("x", "r", "w")),
    Case("softmax_backward", softmax, ("x",)),
    Case("shifted_softmax_backward", shifted_softmax, ("x",)),
    Case("cross_entropy_backward", cross_entropy, ("x",)),
    Case("shifted_cross_entropy_backward", shifted_cross_entropy, ("x",)),
    Case("swiglu_backward", swiglu, ("gate", "up")),
    Case("gelu_backward", gelu, ("x",)),
    Case("packed_swiglu_backward", packed_swiglu, ("gate_up",)),
    Case("rotary_backward", rotary, ("x", "cos")),
    Case("normed_rotary_backward", normed_rotary, ("x", "w")),
]
BY_NAME = {case.name: case for case in CASES}
