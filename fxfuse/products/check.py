"""A rewritten sum of products is compared with the one it replaces, by value, before it is used.

Both are run on random operands of the true widths and few rows, at three input scales; the measure is validation's: how much further
from the original expression in float64 the rewritten one is than the original in the model's dtypes. Verdicts are kept by the text of
the two expressions, their widths and dtypes and the kind of device; on a GPU for all runs of this build on it.

A trial runs in the middle of a training step, whose budget may be tight: what is large are matrices of weights, and of these there is
one copy at a time, never whole in float64. Where such a matrix is frozen its gradient, which nobody asks for, is not compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, fx

from .. import earlier_runs
from ..canonical.facts import known_tensor, tensor_of
from ..canonical.vocabulary import CAST
from ..closeness import closeness
from ..errors import ValidationError
from ..lowering import untimed
from ..trial import Compared
from ..validation import LIMITS, SCALES, Verdict, apart
from .calls import accumulate
from .expression import LINEARS

aten = torch.ops.aten

ROWS = 256
_ELEMENTS = 1 << 20  # on a CPU: few rows of wide operands
LARGE = 1 << 22  # elements: a matrix with more is drawn, and multiplied in float64, in blocks of about so many
_RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.view_as.default)
_CASTS = (CAST, aten._to_copy.default)
_SUMS = (torch.addmm, aten.addmm.default)
_MATMULS = (*LINEARS, *_SUMS, aten.mm.default)
_VIEWS = (aten.t.default, aten.slice.Tensor, aten.transpose.int)
_verdicts: dict[tuple, Verdict] = {}


def agrees(before: Sequence[fx.Node], after: Sequence[fx.Node], leaves: Sequence[fx.Node], *, gradients: bool, mode: str) -> Verdict:
    """May the values ``after`` stand for the values ``before``, both expressions over the nodes ``leaves``?

    gradients: compare those of every leaf too (the derivative is not in this graph: autograd will derive it from what stands here).
    """
    if mode == "off":
        return Verdict()
    device = known_tensor(leaves[0]).device
    wanted = tuple(gradients and not _is_frozen(leaf) for leaf in leaves)
    key = (_text(before, leaves), _text(after, leaves), device.type, wanted if gradients else False)
    if key not in _verdicts:
        asked = (*map(str, key), torch.cuda.get_device_name(device)) if device.type == "cuda" else ()
        known = earlier_runs.recall("sums", *asked) if asked else None
        if known is None:
            with apart(), untimed():
                _verdicts[key] = _judge(before, after, leaves, wanted, device)
            if asked:
                earlier_runs.remember("sums", asdict(_verdicts[key]), *asked)
        else:
            _verdicts[key] = Verdict(**known)
    return _verdicts[key]


def _is_frozen(leaf: fx.Node) -> bool:
    """Is this a large matrix of weights that no gradient is asked for."""
    return not is_data(leaf) and not known_tensor(leaf).requires_grad and known_tensor(leaf).numel() > LARGE


def _judge(before: Sequence[fx.Node], after: Sequence[fx.Node], leaves: Sequence[fx.Node], wanted: Sequence[bool],
           device: torch.device) -> Verdict:
    worst = 0.0
    rows = ROWS if device.type != "cpu" else max(16, min(ROWS, _ELEMENTS // max(_width(leaf) for leaf in leaves)))
    try:
        for scale in SCALES:
            generator = torch.Generator(device if device.type == "cuda" else "cpu").manual_seed(7)
            drawn = [_draw(leaf, rows, scale, generator) for leaf in leaves]
            truth = _run(before, leaves, drawn, wanted, torch.float64)
            eager = _run(before, leaves, drawn, wanted, None)
            ours = _run(after, leaves, drawn, wanted, None)
            names = (f"at input scale {scale:g} {name}" for name in _names(before, leaves, wanted))
            worst = max(worst, _compared([Compared(*result) for result in zip(names, ours, eager, truth, strict=True)]))
    except ValidationError as failure:
        return Verdict(None, str(failure))
    except torch.OutOfMemoryError:
        return Verdict(None, "there was no memory to check it in")
    return Verdict(worst)


def _names(outputs: Sequence[fx.Node], leaves: Sequence[fx.Node], wanted: Sequence[bool]) -> list[str]:
    compared = (leaf for leaf, asked in zip(leaves, wanted, strict=True) if asked)
    return [*(node.name for node in outputs), *(f"the gradient of {leaf.name}" for leaf in compared)]


def _compared(results: Sequence[Compared]) -> float:
    """The worst ratio; an error says which result is too far off."""
    for where, ours, eager, truth in results:
        if ours.shape != truth.shape or ours.dtype != eager.dtype:
            raise ValidationError(f"{where} is {ours.dtype} {tuple(ours.shape)}, eager's is {eager.dtype} {tuple(truth.shape)}")
    worst = 0.0
    for (where, ours, *_), measure in zip(results, closeness([result[1:] for result in results]), strict=True):
        if not measure.overflows_alike:
            raise ValidationError(f"{where} is infinite or NaN in other places than eager's")
        ratio, limit = measure.ratio(ours.dtype, ours.numel()), LIMITS[ours.dtype]
        if not ratio <= limit:
            raise ValidationError(f"{where} is {ratio:.3g} times as far from float64 as eager's, {limit:g} is the limit")
        worst = max(worst, ratio)
    return worst


def _shape(node: fx.Node, rows: int) -> tuple[int, ...]:
    """The shape to try: leading dimensions are one, a size that varies becomes at most ``rows``."""
    shape = known_tensor(node).shape
    if len(shape) > 2:
        leading = math.prod(_hint(size) for size in shape[:-1])
        return min(leading, rows), _hint(shape[-1])
    return tuple(size if isinstance(size, int) else min(_hint(size), rows) for size in shape)


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def _width(leaf: fx.Node) -> int:
    return max((size for size in known_tensor(leaf).shape if isinstance(size, int)), default=1)


def _draw(leaf: fx.Node, rows: int, scale: float, generator: torch.Generator) -> Tensor:
    """Data (what has rows) is normal times the scale; a matrix of weights keeps the size of what it is multiplied with."""
    shape = _shape(leaf, rows)
    values = torch.empty(shape, dtype=known_tensor(leaf).dtype, device=generator.device)
    factor = scale if is_data(leaf) else 1.0 / math.sqrt(max(shape, default=1))
    for part in values.flatten().split(LARGE):
        part.copy_(torch.randn(part.shape, generator=generator, device=generator.device, dtype=torch.float32) * factor)
    return values


def is_data(leaf: fx.Node) -> bool:
    """Does a tensor vary over the rows (tokens) of a batch: its leading sizes are not all numbers, or it has several."""
    shape = known_tensor(leaf).shape
    return len(shape) > 2 or not all(isinstance(size, int) for size in shape)


def _run(outputs: Sequence[fx.Node], leaves: Sequence[fx.Node], drawn: Sequence[Tensor], wanted: Sequence[bool],
         dtype: torch.dtype | None) -> list[Tensor]:
    """The outputs (and the gradients of the leaves that are wanted), in the graph's dtypes or all in one."""
    inputs = [t if _is_large(t) and not is_data(leaf) and not asked else t.clone() if dtype is None else t.to(dtype)
              for t, leaf, asked in zip(drawn, leaves, wanted, strict=True)]
    compared = [t.requires_grad_() for t, asked in zip(inputs, wanted, strict=True) if asked]
    values = dict(zip(leaves, inputs, strict=True))
    with torch.set_grad_enabled(bool(compared)):
        results = [evaluate(node, values, dtype) for node in outputs]
    if not compared:
        return results
    generator = torch.Generator(results[0].device).manual_seed(11)
    cotangents = [torch.randn(r.shape, generator=generator, device=r.device).to(known_tensor(n).dtype).to(r.dtype)
                  for r, n in zip(results, outputs, strict=True)]
    grads = torch.autograd.grad(results, compared, cotangents)
    return [*(r.detach() for r in results), *grads]


def _is_large(value: Any) -> bool:
    """Is this a matrix that is not to be copied as a whole: nothing writes into weights, and products in float64 take blocks."""
    return isinstance(value, Tensor) and value.dim() == 2 and value.numel() > LARGE


def evaluate(node: fx.Node, values: dict[fx.Node, Tensor], dtype: torch.dtype | None) -> Tensor:
    """The value of a node; what is known stands in ``values``. Leading dimensions are merged, so views of rows do nothing.

    A matmul whose recorded result is of another dtype than its operands ran under autocast: the operands are cast, as there.
    """
    if node in values:
        return values[node]
    if node.op != "call_function":
        raise ValidationError(f"{node.name} was not taken for an operand of the expression")
    target = node.target
    if target in _RESHAPES:
        result = evaluate(node.args[0], values, dtype)  # type: ignore[arg-type]
    elif target in _CASTS:
        result = evaluate(node.args[0], values, dtype)  # type: ignore[arg-type]
        result = result.to(dtype or known_tensor(node).dtype)
    else:
        cast = target in _MATMULS or target is accumulate

        def operand(argument: Any) -> Any:
            value = evaluate(argument, values, dtype)
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            if dtype is not None:
                return value if _is_large(value) and (cast or target in _VIEWS) else value.to(dtype)
            return value.to(known_tensor(node).dtype) if cast else value

        args, kwargs = fx.map_arg(node.args, operand), fx.map_arg(node.kwargs, operand)
        blocks = cast and dtype is not None and any(map(_is_large, args))
        result = _in_blocks(target, args, kwargs, dtype) if blocks else target(*args, **kwargs)  # type: ignore[operator]
    values[node] = result
    return result


def _in_blocks(target: Any, args: tuple, kwargs: dict[str, Any], dtype: torch.dtype | None) -> Tensor:
    """A product in a wider dtype with a large factor: if that is the right one, blocks of its columns are made wide one by one."""
    *added, left, right = args
    if len(args) > (3 if target in _SUMS else 2) or not _is_large(right):  # (a linear's bias)
        return target(*(a.to(dtype) if isinstance(a, Tensor) else a for a in args), **kwargs)
    across = right.t() if target in LINEARS else right
    blocks = across.split(max(1, LARGE // across.shape[0]), 1)
    product = torch.cat([left.to(dtype) @ block.to(dtype) for block in blocks], 1)
    return product if not added else kwargs.get("beta", 1) * added[0].to(dtype) + kwargs.get("alpha", 1) * product


def _text(outputs: Sequence[fx.Node], leaves: Sequence[fx.Node]) -> str:
    """An expression as text: equal texts compute equal values of equal operands."""
    names = {leaf: f"in{i}:{_facts(leaf)}" for i, leaf in enumerate(leaves)}
    lines: list[str] = []

    def name(node: fx.Node) -> str:
        if node not in names:
            if tensor_of(node) is None and not isinstance(node.meta.get("val"), tuple):
                return "size"
            args = fx.map_arg((node.args, node.kwargs), lambda n: _Word(name(n)))
            lines.append(f"{_called(node.target)}{args} -> {_facts(node)}")
            names[node] = f"%{len(lines)}"
        return names[node]

    words = [name(node) for node in outputs]
    return "\n".join([*lines, *words, *names.values()])


def _called(target: Callable[..., Any] | str) -> str:
    return str(target) if isinstance(target, torch._ops.OpOverload) else getattr(target, "__qualname__", str(target))


class _Word(str):
    __repr__ = str.__str__


def _facts(node: fx.Node) -> str:
    tensor = tensor_of(node)
    if tensor is None:
        return "?"
    return f"{tensor.dtype!s}[{','.join(str(s) if isinstance(s, int) else '*' for s in tensor.shape)}]"
