"""``derive``: the backward of a plain function, to be read, checked and run.

    d = fxfuse.derive(f, x, w)
    print(d)          # forward, saved set and backward as equations
    d.forward         # the same as sympy: equations between symbols
    d.latex()         # for a paper
    d.triton()        # the generated kernels
    d.check()         # the gradients against torch autograd, in float64
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import Tensor

from .derivation import cotangent_name, derive_backward, gradient_name
from .errors import UnsupportedGraph
from .mathematics import Equations, as_latex, as_text, equations
from .pattern_trace import pattern_program
from .program import REAL_DTYPES, Program
from .reference import torch_dtype
from .residuals import STATISTIC, plan_residuals, saved_names
from .rules import usual

SCALES = (1e-3, 1.0, 1e3)


def derive(function: Callable[..., Any], *example_inputs: Tensor) -> Derivation:
    """Derive the backward of a plain function of tensors: one row program (pointwise, and reductions over the last dimension).

    example_inputs: tensors of the shapes and dtypes to derive it for; a dimension of size 1, or a missing one, is broadcast.
    """
    function = usual(getattr(function, "function", function))
    names = _operand_names(function, len(example_inputs))
    for name, example in zip(names, example_inputs, strict=True):
        if not isinstance(example, Tensor):
            raise TypeError(f"fxfuse.derive takes tensors after the function; {name} is a {type(example).__name__}. "
                            "Bind other arguments with functools.partial")
    program = _with_plain_outputs(pattern_program(function, dict(zip(names, example_inputs, strict=True)), {}))
    if before := [a.name for a in program.arguments if a.name not in names]:
        raise UnsupportedGraph(f"{_name(function)}: {', '.join(before)} is computed before the row program, which takes it as an "
                               "operand; derive the function of that operand")
    wanted = tuple(a.name for a in program.arguments if a.kind == "real")
    forward = plan_residuals(program, wanted)
    cotangents = tuple(o.name for o in program.outputs if o.dtype in REAL_DTYPES)
    saved = saved_names(forward, wanted)
    backward = derive_backward(forward, cotangents, wanted, saved)
    return Derivation(function, names, tuple(example_inputs), forward, backward)


def _name(function: Callable[..., Any]) -> str:
    return getattr(getattr(function, "func", function), "__name__", "the function")


def _with_plain_outputs(program: Program) -> Program:
    """The one output is y; several are y1, y2, ..."""
    several = len(program.outputs) > 1
    outputs = tuple(replace(o, name=f"y{i}" if several else "y") for i, o in enumerate(program.outputs, 1))
    return replace(program, outputs=outputs)


def _operand_names(function: Callable[..., Any], count: int) -> list[str]:
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters) or len(parameters) < count:
        return [f"x{i}" for i in range(count)]
    return [p.name for p in parameters[:count]]


@dataclass(frozen=True)
class Checked:
    """The largest relative error of results and gradients over all scales: rmse(ours - torch's) / rms(torch's)."""

    errors: dict[str, float]
    tolerance: float = 1e-9

    @property
    def passed(self) -> bool:
        return all(error <= self.tolerance for error in self.errors.values())

    def __str__(self) -> str:
        verdict = "agree with" if self.passed else "DIFFER from"
        told = ", ".join(f"{name} {error:.1e}" for name, error in self.errors.items())
        return f"results and derived gradients {verdict} torch autograd in float64 (relative errors: {told})"


@dataclass(frozen=True)
class Derivation:
    """A forward program with what it saves, and the backward program derived from it."""

    function: Callable[..., Any]
    operands: list[str]
    example_inputs: tuple[Tensor, ...]
    forward_program: Program
    backward_program: Program

    @cached_property
    def _forward(self) -> Equations:
        return equations(self.forward_program)

    @cached_property
    def _statistics(self) -> dict[str, sympy.Expr]:
        """What a saved statistic is called: by its letter in the forward."""
        return {o.name: self._forward.symbols[o.stores[0][0]] for o in self.forward_program.outputs
                if o.name.startswith(STATISTIC) and o.stores[0][0] in self._forward.symbols}

    @cached_property
    def forward(self) -> tuple[sympy.Eq, ...]:
        """Row statistics, then outputs."""
        hidden = {o.name for o in self.forward_program.outputs} & set(self._statistics)
        return tuple(e for e in self._forward if str(e.lhs) not in hidden)

    @cached_property
    def backward(self) -> tuple[sympy.Eq, ...]:
        """Sums over columns, then gradients, in terms of operands, saved values and cotangents g_<output>."""
        return tuple(equations(self.backward_program, self._statistics, letter="c"))

    @cached_property
    def saved(self) -> tuple[sympy.Expr, ...]:
        """What the backward reads of the forward: operands, outputs, and statistics by their letter."""
        names = [a.name for a in self.backward_program.arguments if not self._is_cotangent(a.name)]
        return tuple(self._statistics.get(name, sympy.Symbol(name, real=True)) for name in names)

    def _is_cotangent(self, name: str) -> bool:
        return name in {cotangent_name(o.name) for o in self.forward_program.outputs}

    def __str__(self) -> str:
        lines = ["forward", *(f"    {as_text(e)}" for e in self.forward)]
        lines += [f"saved: {', '.join(map(str, self.saved)) or 'nothing'}"]
        lines += ["backward", *(f"    {as_text(e)}" for e in self.backward)]
        return "\n".join(lines)

    def latex(self) -> str:
        """An align environment: forward, a rule, backward."""
        rows = [as_latex(e) for e in self.forward]
        rows[-1] += r" \\ \hline"
        rows += [as_latex(e) for e in self.backward]
        body = "\n".join(row if row.endswith(r"\hline") else rf"{row} \\" for row in rows)
        body = body.replace(r" \\ \hline", r" \\[1ex]")
        return rf"\begin{{align*}}{chr(10)}{body}{chr(10)}\end{{align*}}"

    def triton(self) -> str:
        """The Triton source of the forward and of the backward, as for dense tensors."""
        from .kernels.catalogue import contiguous_schedule, emit  # Triton exists on Linux alone

        programs = {"forward": self.forward_program, "backward": self.backward_program}
        return "\n\n".join(emit(p, contiguous_schedule(p), f"{_name(self.function)}, {which}") for which, p in programs.items())

    def check(self) -> Checked:
        """Compare the fused function with torch: its results, and its gradients with autograd's, in float64 at three scales.

        Where the function itself rounds to a narrower dtype, up to that rounding: autograd rounds gradients there, too.
        """
        from .fusing import fuse  # fusing is the last stage, this one only looks at the first

        fused = fuse(self.function)
        generator = torch.Generator().manual_seed(0)
        errors: dict[str, float] = {}
        for scale in SCALES:
            operands = [self._random(x, scale, generator) for x in self.example_inputs]
            wanted = {name: x for name, x in zip(self.operands, operands, strict=True) if x.requires_grad}
            ours, theirs = _tensors(fused(*operands)), _tensors(self.function(*operands))
            cotangents = [torch.randn(y.shape, dtype=y.dtype, generator=generator) for y in theirs]
            compared = {f"y{i}" if len(ours) > 1 else "y": pair for i, pair in enumerate(zip(ours, theirs, strict=True))}
            gradients = zip(_gradients(ours, wanted, cotangents), _gradients(theirs, wanted, cotangents), strict=True)
            compared |= {gradient_name(name): pair for name, pair in zip(wanted, gradients, strict=True)}
            for name, (got, expected) in compared.items():
                errors[name] = max(errors.get(name, 0.0), _relative_error(got, expected))
        casts = [torch.finfo(torch_dtype(n.attributes[0])).eps for n in self.forward_program.nodes if n.op == "cast"]
        return Checked(errors, max([1e-9, *(4 * eps for eps in casts)]))

    def _random(self, example: Tensor, scale: float, generator: torch.Generator) -> Tensor:
        if not example.is_floating_point():
            return example.cpu()
        values = scale * torch.randn(example.shape, dtype=torch.float64, generator=generator)
        return values.requires_grad_()


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _gradients(results: list[Tensor], wanted: dict[str, Tensor], cotangents: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(results, list(wanted.values()), cotangents, allow_unused=True, materialize_grads=True)


def _relative_error(got: Tensor, expected: Tensor) -> float:
    difference, size = (got - expected).detach().norm(), expected.detach().norm()
    return float(difference / size.clamp(min=torch.finfo(torch.float64).tiny))
