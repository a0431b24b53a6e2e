"""Row programs that tests share: one small builder per idea, all with two row dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxfuse.program import Argument, Lane, Program, ProgramBuilder

FULL, COLUMN = (True, True), (False, False)


class Rows(ProgramBuilder):
    """A builder that also declares and loads whole tensors."""

    def whole(self, name: str, axis: str, dtype: str, rows: tuple[bool, ...] = FULL) -> int:
        self.argument(name, dtype, rows, axis)
        return self.load(name, Lane(axis))

    def store(self, name: str, dtype: str, value: int, axis: str | None, rows: tuple[bool, ...] = FULL) -> None:
        self.output(name, dtype, rows, axis, ((value, None if axis is None else Lane(axis)),))

    def scaled(self, number: float, value: int) -> int:
        return self.apply("mul", self.const(number), value)

    def mean(self, axis: str, value: int) -> int:
        return self.apply("div", self.reduce("sum", axis, value), self.width(axis))

    def rstd(self, axis: str, value: int, eps: float = 1e-6) -> int:
        mean = self.mean(axis, self.apply("square", value))
        return self.apply("rsqrt", self.apply("add", mean, self.const(eps)))


def rms_norm(dtype: str = "float32") -> Program:
    b = Rows(2)
    a = b.axis(None, "a")
    x, w = b.whole("x", a, dtype), b.whole("w", a, dtype, COLUMN)
    normed = b.cast(dtype, b.apply("mul", x, b.rstd(a, x)))
    b.store("y", dtype, b.apply("mul", w, normed), a)
    return b.build()


def residual_norm(dtype: str = "float32") -> Program:
    b = Rows(2)
    a = b.axis(None, "a")
    x, r, w = b.whole("x", a, dtype), b.whole("r", a, dtype), b.whole("w", a, dtype, COLUMN)
    h = b.cast(dtype, b.apply("add", x, r))
    b.store("h", dtype, h, a)
    b.store("y", dtype, b.apply("mul", w, b.cast(dtype, b.apply("mul", h, b.rstd(a, h)))), a)
    return b.build()


def layer_norm(dtype: str = "float32") -> Program:
    b = Rows(2)
    a = b.axis(None, "a")
    x, w, bias = b.whole("x", a, dtype), b.whole("w", a, dtype, COLUMN), b.whole("b", a, dtype, COLUMN)
    centred = b.apply("sub", x, b.mean(a, x))
    y = b.apply("mul", b.apply("mul", centred, b.rstd(a, centred)), w)
    b.store("y", dtype, b.apply("add", y, bias), a)
    return b.build()


def l2_norm(dtype: str = "float32") -> Program:
    b = Rows(2)
    a = b.axis(None, "a")
    x = b.whole("x", a, dtype)
    norm = b.apply("sqrt", b.reduce("sum", a, b.apply("square", x)))
    b.store("y", dtype, b.apply("div", x, b.apply("clamp_min", norm, b.const(1e-12))), a)
    return b.build()


def _rotated(b: Rows, lanes: Sequence[Lane], x: Sequence[int], name: str, columns: int, dtype: str,
             rest: Sequence[tuple[int, Lane]] = ()) -> None:
    """Store x rotated by the angle whose cosine and sine are arguments of half width, broadcast over the heads."""
    axis = lanes[0].axis
    c, s = b.whole("cos", axis, dtype, (True, False)), b.whole("sin", axis, dtype, (True, False))
    first = b.apply("sub", b.apply("mul", x[0], c), b.apply("mul", x[1], s))
    second = b.apply("add", b.apply("mul", x[1], c), b.apply("mul", x[0], s))
    b.output(name, dtype, FULL, columns, ((first, lanes[0]), (second, lanes[1]), *rest))


def rope(dtype: str = "float32", interleaved: bool = False, rest: int = 0) -> Program:
    """Rotary embedding of the first 6 columns; ``rest`` columns pass through."""
    b = Rows(2)
    h = b.axis(3, "h")
    lanes = (Lane(h, 0, 2), Lane(h, 1, 2)) if interleaved else (Lane(h, 0), Lane(h, 3))
    b.argument("x", dtype, FULL, 6 + rest)
    passed = [Lane(b.axis(rest, "p"), 6)] if rest else []
    x = [b.load("x", lane) for lane in lanes]
    _rotated(b, lanes, x, "y", 6 + rest, dtype, [(b.load("x", lane), lane) for lane in passed])
    return b.build()


def rope_of_a_slice(dtype: str = "float32") -> Program:
    """Reads 6 of 11 columns of its argument: the gradient of the others is zero."""
    b = Rows(2)
    h = b.axis(3, "h")
    b.argument("x", dtype, FULL, 11)
    x = [b.load("x", Lane(h, offset)) for offset in (2, 6)]
    _rotated(b, (Lane(h, 0), Lane(h, 3)), x, "y", 6, dtype)
    return b.build()


def qk_norm_rope(dtype: str = "float32") -> Program:
    """RMSNorm over both halves of a head, then rotary embedding."""
    b = Rows(2)
    h = b.axis(3, "h")
    lanes = (Lane(h, 0), Lane(h, 3))
    b.argument("x", dtype, FULL, 6)
    b.argument("w", dtype, COLUMN, 6)
    x, w = [b.load("x", lane) for lane in lanes], [b.load("w", lane) for lane in lanes]
    sums = [b.reduce("sum", h, b.apply("square", v)) for v in x]
    mean = b.apply("div", b.apply("add", *sums), b.apply("add", b.width(h), b.width(h)))
    r = b.apply("rsqrt", b.apply("add", mean, b.const(1e-6)))
    normed = [b.cast(dtype, b.apply("mul", v, b.cast(dtype, b.apply("mul", u, r)))) for u, v in zip(x, w, strict=True)]
    _rotated(b, lanes, normed, "y", 6, dtype)
    return b.build()


def swiglu(dtype: str = "float32", packed: bool = False) -> Program:
    b = Rows(2)
    a = b.axis(5, "a")
    if packed:
        b.argument("x", dtype, FULL, 10)
        gate, up = b.load("x", Lane(a, 0)), b.load("x", Lane(a, 5))
    else:
        gate, up = b.whole("gate", a, dtype), b.whole("up", a, dtype)
    silu = b.cast(dtype, b.apply("mul", gate, b.apply("sigmoid", gate)))
    b.store("y", dtype, b.apply("mul", silu, up), a)
    return b.build()


def clamped_swiglu(dtype: str = "float32") -> Program:
    b = Rows(2)
    a = b.axis(4, "a")
    b.argument("x", dtype, FULL, 8)
    gate, up = b.load("x", Lane(a, 0, 2)), b.load("x", Lane(a, 1, 2))
    gate = b.apply("clamp_max", gate, b.const(0.7))
    up = b.apply("clamp_min", b.apply("clamp_max", up, b.const(0.7)), b.const(-0.7))
    glu = b.apply("mul", gate, b.apply("sigmoid", b.scaled(1.702, gate)))
    b.store("y", dtype, b.apply("mul", b.apply("add", up, b.const(1.0)), glu), a)
    return b.build()


def softmax(dtype: str = "float32", cap: float | None = None) -> Program:
    b = Rows(2)
    a = b.axis(None, "a")
    x = b.whole("x", a, dtype)
    if cap is not None:
        x = b.scaled(cap, b.apply("tanh", b.apply("div", x, b.const(cap))))
    b.store("y", dtype, b.apply("exp", b.apply("sub", x, b.reduce("logsumexp", a, x))), a)
    return b.build()


def softmax_by_hand(dtype: str = "float32") -> Program:
    b = Rows(2)
    a = b.axis(None, "a")
    x = b.whole("x", a, dtype)
    e = b.apply("exp", b.apply("sub", x, b.reduce("max", a, x)))
    b.store("y", dtype, b.apply("div", e, b.reduce("sum", a, e)), a)
    return b.build()


def cross_entropy(dtype: str = "float32", smoothing: float = 0.0, scale: float = 1.0) -> Program:
    """Per row: logsumexp(z) - z[label], z = scale * x; 0 where the label is -100."""
    b = Rows(2)
    a = b.axis(None, "a")
    x = b.whole("x", a, dtype)
    b.argument("label", "int64", FULL, None)
    label = b.load("label", None)
    z = x if scale == 1.0 else b.scaled(scale, x)
    lse = b.reduce("logsumexp", a, z)
    ignored = b.apply("eq", label, b.const(-100))
    index = b.check_index(a, b.apply("select", ignored, b.const(0), label))
    picked = b.reduce("sum", a, b.apply("select", b.apply("eq", b.iota(a), index), z, b.const(0.0)))
    loss = b.apply("sub", lse, picked)
    if smoothing:
        spread = b.apply("sub", lse, b.mean(a, z))
        loss = b.apply("add", b.scaled(1 - smoothing, loss), b.scaled(smoothing, spread))
    b.store("loss", dtype, b.apply("select", ignored, b.const(0.0), loss), None)
    return b.build()


def scalars(dtype: str = "float32") -> Program:
    """Every broadcast there is: y = (x * row + scalar) * column, with a sum of what does not vary over columns."""
    b = Rows(2)
    a = b.axis(None, "a")
    x, column = b.whole("x", a, dtype), b.whole("column", a, dtype, COLUMN)
    b.argument("row", dtype, (False, True), None)
    b.argument("scalar", dtype, COLUMN, None)
    row, scalar = b.load("row", None), b.load("scalar", None)
    y = b.apply("mul", b.apply("add", b.apply("mul", x, row), scalar), column)
    total = b.apply("add", b.reduce("sum", a, b.apply("add", y, b.apply("mul", row, scalar))), row)
    b.store("y", dtype, b.apply("add", y, total), a)
    b.store("t", dtype, b.apply("tanh", total), None)
    return b.build()


PROGRAMS: dict[str, Program] = {
    "rms_norm": rms_norm(),
    "residual_norm": residual_norm(),
    "layer_norm": layer_norm(),
    "l2_norm": l2_norm(),
    "rope": rope(),
    "rope_interleaved": rope(interleaved=True),
    "rope_partial": rope(rest=5),
    "rope_of_a_slice": rope_of_a_slice(),
    "qk_norm_rope": qk_norm_rope(),
    "swiglu": swiglu(),
    "swiglu_packed": swiglu(packed=True),
    "clamped_swiglu": clamped_swiglu(),
    "softmax": softmax(),
    "softmax_capped": softmax(cap=5.0),
    "softmax_by_hand": softmax_by_hand(),
    "cross_entropy": cross_entropy(),
    "cross_entropy_smoothed": cross_entropy(smoothing=0.1, scale=0.25),
    "scalars": scalars(),
}


def float64(program: Program) -> Program:
    return program.retyped(dict.fromkeys(("float16", "bfloat16", "float32"), "float64"))


def tensors(program: Program, scale: float = 1.0, leading: Sequence[int] = (3, 4), width: int = 7,
            grad: bool = True) -> dict[str, Tensor]:
    """Random arguments for a program, by name; labels in range, one in three ignored."""
    return {a.name: _tensor(program, a, scale, leading, width, grad) for a in program.arguments}


def _tensor(program: Program, argument: Argument, scale: float, leading: Sequence[int], width: int,
            grad: bool) -> Tensor:
    widths = {name: width if known is None else known for name, known in program.axes}
    columns = widths[argument.columns] if isinstance(argument.columns, str) else argument.columns or 1
    shape = [n if varies else 1 for n, varies in zip(leading, argument.rows, strict=True)] + [columns]
    if argument.kind == "int":
        labels = torch.randint(0, width, shape)
        return torch.where(torch.rand(shape) < 1 / 3, -100, labels)
    values = scale * torch.randn(shape, dtype=torch.float64)
    return values.to(getattr(torch, argument.dtype)).requires_grad_(grad)
