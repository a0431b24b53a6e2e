"""One trial of a site: the same random inputs through the model's code in float64, through it in some dtypes, and fused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from .canonical.facts import known_tensor, tensor_of, value_of
from .errors import ValidationError
from .oracle_inputs import draw
from .program import Program
from .site_graph import FLOATING, Instance, SiteGraph, Sizes, run_with_gradients

_TO_DOUBLE = {dtype: torch.float64 for dtype in FLOATING}
# Of a very wide site fewer rows are tried: this many elements an input are plenty.
_ELEMENTS = 1 << 18


class Compared(NamedTuple):
    """An output or gradient, three times."""

    name: str
    ours: Tensor
    eager: Tensor
    truth: Tensor


@dataclass(frozen=True)
class Trial:
    """``program`` at a site, with ``dtypes`` put in place of the model's, on a device; on ``most_rows`` rows however many are asked
    for."""

    site: SiteGraph
    program: Program
    device: torch.device
    dtypes: dict[torch.dtype, torch.dtype]
    seed: int = 7
    most_rows: int = 1 << 30

    def run(self, scale: float, rows: int) -> Iterator[Compared]:
        """Every output and gradient, for inputs of a scale and about so many rows."""
        sizes = self.run_sizes(rows)
        inputs, outputs, generator = self._inputs_with_truth(sizes, scale)
        cotangents = [self._cotangent(o, view.node, generator)
                      for o, view in zip(outputs, self.site.region.outputs, strict=True)]
        wanted = self.site.wanted
        truth = run_with_gradients(self._oracle(sizes), _doubled(inputs), wanted, cotangents)
        typed = [self._typed(value, node) for value, node in zip(inputs, self.site.inputs, strict=True)]
        eager = run_with_gradients(Instance(self.site.original, self.dtypes, sizes), typed, wanted, cotangents)
        ours = run_with_gradients(Instance(self.site.fused(self.program), self.dtypes, sizes), typed, wanted, cotangents)
        for name, a, b, t in zip(self._names(), ours, eager, truth, strict=True):
            if a is not None or b is not None:
                yield Compared(name, *(_or_zero(x, t, b if b is not None else a) for x in (a, b, t)))

    def rehearse(self, rows: int) -> None:
        """The fused op forward and backward alone, on inputs of such sizes; what comes out is not looked at."""
        sizes = self.run_sizes(rows)
        inputs, outputs, generator = self._inputs_with_truth(sizes, 1.0)
        cotangents = [self._cotangent(o, view.node, generator) for o, view in zip(outputs, self.site.region.outputs, strict=True)]
        typed = [self._typed(value, node) for value, node in zip(inputs, self.site.inputs, strict=True)]
        run_with_gradients(Instance(self.site.fused(self.program), self.dtypes, sizes), typed, self.site.wanted, cotangents)

    def run_sizes(self, rows: int) -> Sizes:
        """Small sizes for about so many rows."""
        return self.site.sizes(self._affordable(rows))

    def _names(self) -> list[str]:
        arguments = {view.node: a.name for view, a in zip(self.site.region.arguments, self.program.arguments, strict=False)}
        inputs = [arguments.get(node, node.name) for node in self.site.sources]
        return [*(f"output {view.node.name}" for view in self.site.region.outputs),
                *(f"the gradient of {inputs[i]}" for i in self.site.wanted)]

    def _affordable(self, rows: int) -> int:
        widths = [int(t.shape[-1]) for n in self.site.inputs
                  if (t := tensor_of(n)) is not None and t.dim() and isinstance(t.shape[-1], int)]
        return min(rows, self.most_rows, max(16, _ELEMENTS // max(widths, default=1)))

    def _oracle(self, sizes: Sizes) -> Instance:
        return Instance(self.site.original, _TO_DOUBLE, sizes)

    def _inputs_with_truth(self, sizes: Sizes, scale: float) -> tuple[list[Any], list[Tensor], torch.Generator]:
        """Inputs in float64; where the function is not defined on all numbers (a logarithm), positive ones."""
        for positive in (False, True):
            generator = torch.Generator(self.device).manual_seed(self.seed)
            inputs = [self._drawn(i, sizes, scale, generator, positive) for i in range(len(self.site.inputs))]
            with torch.no_grad():
                outputs = list(self._oracle(sizes).run(*_doubled(inputs)))
            for output, view in zip(outputs, self.site.region.outputs, strict=True):
                if view.loss_reduction is None and tuple(output.shape) != sizes.shape(view.node, view.layout):
                    raise ValidationError(f"{view.node.name} cannot be tried on fewer rows: it comes out as {tuple(output.shape)}")
            if not any(bool(torch.isnan(output).any()) for output in outputs):
                break
        return inputs, outputs, generator

    def _drawn(self, index: int, sizes: Sizes, scale: float, generator: torch.Generator, positive: bool) -> Any:
        value = value_of(self.site.inputs[index])
        if isinstance(value, int | torch.SymInt):
            return sizes.size(value)
        if not isinstance(value, Tensor):
            return value.node.hint if hasattr(value, "node") else value
        shape = sizes.shape(self.site.inputs[index], self.site.layout_of(index))
        drawn = draw(self.program, self.site.argument_of(index), shape, self._widths(), scale, generator, positive)
        return _laid_out_as(drawn, value)

    def _widths(self) -> dict[str, int]:
        """Widths of the program's axes; the run-time ones from the inputs' columns, which stay as they are."""
        widths = {name: width for name, width in self.program.axes if width is not None}
        for view, argument in zip(self.site.region.arguments, self.site.region.program.arguments, strict=True):
            if isinstance(argument.columns, str):
                size = known_tensor(view.node).shape[-1]
                widths[argument.columns] = size if isinstance(size, int) else size.node.hint
        return widths

    def _cotangent(self, output: Tensor, node: fx.Node, generator: torch.Generator) -> Tensor:
        dtype = known_tensor(node).dtype
        drawn = torch.randn(output.shape, generator=generator, dtype=torch.float64, device=generator.device)
        return drawn.to(self.dtypes.get(dtype, dtype)).double()

    def _typed(self, value: Any, node: fx.Node) -> Any:
        if not isinstance(value, Tensor):
            return value
        dtype = known_tensor(node).dtype
        return value.to(self.device, self.dtypes.get(dtype, dtype))


def _doubled(inputs: list[Any]) -> list[Any]:
    return [value.double() if isinstance(value, Tensor) and value.is_floating_point() else value for value in inputs]


def _or_zero(value: Tensor | None, shape_of: Tensor | None, dtype_of: Tensor) -> Tensor:
    """A gradient that autograd left out is zero."""
    if value is not None:
        return value
    return torch.zeros_like(dtype_of if shape_of is None else shape_of, dtype=dtype_of.dtype)


def _laid_out_as(values: Tensor, example: Tensor) -> Tensor:
    """The values with the dimensions in memory in the example's order (a transposed query stays transposed)."""
    strides = [s if isinstance(s, int) else s.node.hint for s in example.stride()]
    order = sorted(range(values.dim()), key=lambda d: -strides[d])
    inverse = sorted(range(values.dim()), key=order.__getitem__)
    return values.permute(order).contiguous().permute(inverse)
