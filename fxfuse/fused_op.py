"""The fused op: ``fxfuse::rows(Tensor[] ins, str program) -> Tensor[]``, one op for every row program.

The canonical text of the program is an argument of the op, so a graph that holds it is self-contained: it can be
printed, retraced, cached and run in another process. The op is functional. Its derivative is the op again, with the
program that ``derive_backward`` gives; so it can be differentiated any number of times, and no derivative is written here.

Dtypes are those that the program names, whatever autocast says: rounding points are part of a program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from ._torch import is_traceable_wrapper_subclass
from .derivation import cotangent_name, derive_backward
from .errors import UnsupportedGraph
from .lowering import launcher
from .program import REAL_DTYPES, Output, Program, parse
from .residuals import STATISTIC, saved_names

LIBRARY = torch.library.Library("fxfuse", "DEF")
LIBRARY.define(
    "rows(Tensor[] ins, str program) -> Tensor[]",
    # The layout of the outputs follows that of the inputs, so nothing may restride these.
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)
rows = torch.ops.fxfuse.rows.default


def check_tensors(program: Program, tensors: Sequence[Any], site: str = "fxfuse::rows") -> None:
    """Raise UnsupportedGraph unless these are plain tensors of the declared dtypes, all on one device."""
    if len(tensors) != len(program.arguments):
        raise UnsupportedGraph(f"{site}: the program takes {len(program.arguments)} tensors, not {len(tensors)}")
    for argument, tensor in zip(program.arguments, tensors, strict=True):
        if not isinstance(tensor, Tensor) or is_foreign(tensor):
            raise UnsupportedGraph(
                f"{site}: argument {argument.name!r} is a {type(tensor).__name__}; fused ops take plain tensors. "
                "Fuse before the tensor is wrapped, or pass its local part"
            )
        if tensor.dtype != reference.torch_dtype(argument.dtype):
            raise UnsupportedGraph(
                f"{site}: argument {argument.name!r} is {tensor.dtype}, the program was made for {argument.dtype}; trace it again"
            )
        if tensor.device != tensors[0].device:
            raise UnsupportedGraph(
                f"{site}: argument {argument.name!r} is on {tensor.device}, others are on {tensors[0].device}; "
                "move it, or leave it out of the region"
            )


def is_foreign(tensor: Tensor) -> bool:
    """Is this a tensor subclass that has its own ideas of what an op does (DTensor, nested, quantized)?"""
    return is_traceable_wrapper_subclass(tensor) or tensor.layout != torch.strided


def _run_rows(ins: Sequence[Tensor], program: str) -> list[Tensor]:
    check_tensors(parse(program), ins)
    return launcher(program, ins[0].device.type)(ins)


def fake_rows(ins: Sequence[Tensor], program: str) -> list[Tensor]:
    """Uninitialised outputs: shapes, dtypes and strides of what the op gives; sizes may be symbolic."""
    parsed = parse(program)
    return [reference.allocate(parsed, output, ins) for output in parsed.outputs]


class Backward(NamedTuple):
    """How one use of a forward program is differentiated.

    ``program``: the backward program, None where no gradient flows. ``tensors``: what each of its arguments is, by name: an
    argument or an output of the forward program, or ``g_<output>``. ``gradients``: for each forward argument the index of its gradient
    among the backward program's outputs, or None.
    """

    program: str | None
    tensors: tuple[str, ...]
    gradients: tuple[int | None, ...]


@lru_cache(maxsize=4096)
def backward_of(program: str, cotangents: tuple[str, ...], wanted: tuple[str, ...]) -> Backward:
    """The backward of a program for those outputs that have a cotangent and those arguments whose gradient is wanted."""
    forward = parse(program)
    reached = tuple(name for name in wanted if name in differentiable_arguments(forward, cotangents))
    if not reached:
        return Backward(None, (), (None,) * len(forward.arguments))
    derived = derive_backward(forward, cotangents, reached, saved_names(forward, wanted))
    derived, positions = without_repetition(derived)
    position = dict(zip(reached, positions, strict=True))
    return Backward(
        str(derived),
        tuple(argument.name for argument in derived.arguments),
        tuple(position.get(argument.name) for argument in forward.arguments),
    )


def without_repetition(program: Program) -> tuple[Program, list[int]]:
    """The program with equal outputs stored once, and where each output is now (both terms of a sum have one gradient)."""
    kept: list[Output] = []
    positions: list[int] = []
    for output in program.outputs:
        same = [i for i, other in enumerate(kept) if replace(other, name=output.name) == output]
        if not same:
            kept.append(output)
        positions.append(same[0] if same else len(kept) - 1)
    return replace(program, outputs=tuple(kept)), positions


def differentiable_arguments(program: Program, outputs: Sequence[str]) -> set[str]:
    """The real arguments that the named outputs depend on through real values."""
    pending = [value for output in program.outputs if output.name in outputs for value, _ in output.stores]
    seen: set[int] = set()
    found: set[str] = set()
    while pending:
        value = pending.pop()
        if value in seen or program.kinds[value] != "real":
            continue
        seen.add(value)
        node = program.nodes[value]
        if node.op == "load":
            found.add(node.attributes[0])
        pending += node.operands
    return found


def _setup_context(ctx: Any, inputs: tuple[Sequence[Tensor], str], output: Sequence[Tensor]) -> None:
    """Keep what the backward reads when every output has a cotangent, and nothing else."""
    ins, text = inputs
    program = parse(text)
    ctx.set_materialize_grads(False)
    ctx.text = text
    ctx.shapes = [tensor.shape for tensor in ins]
    # torch gives the flags flat here, one a tensor, and nested in the backward.
    wanted = tuple(a.name for a, needed in zip(program.arguments, ctx.needs_input_grad, strict=False) if needed)
    named = {a.name: tensor for a, tensor in zip(program.arguments, ins, strict=True)}
    named |= {o.name: tensor for o, tensor in zip(program.outputs, output, strict=True)}
    ctx.names = [name for name in _read_by_backward(text, wanted) if name in named]
    ctx.save_for_backward(*(named[name] for name in ctx.names))


@lru_cache(maxsize=4096)
def _read_by_backward(text: str, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """What the backward reads in first-order use, when every output but the statistics has a cotangent."""
    outputs = tuple(o.name for o in parse(text).outputs if o.dtype in REAL_DTYPES and not o.name.startswith(STATISTIC))
    return backward_of(text, outputs, wanted).tensors


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[list[Tensor | None], None]:
    program = parse(ctx.text)
    arrived = {o.name: grad for o, grad in zip(program.outputs, grads, strict=True) if grad is not None}
    wanted = tuple(a.name for a, needed in zip(program.arguments, ctx.needs_input_grad[0], strict=True) if needed)
    plan = backward_of(ctx.text, tuple(arrived), wanted)
    if plan.program is None:
        return [None] * len(ctx.shapes), None
    named = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
    named |= {cotangent_name(name): grad for name, grad in arrived.items()}
    results = rows([named[name] for name in plan.tensors], plan.program)
    gradients = [None if index is None else results[index] for index in plan.gradients]
    # A gradient has all dimensions of the domain; an argument may have been given without the leading ones.
    return [
        grad if grad is None or len(shape) == grad.dim() else grad.reshape(shape)
        for grad, shape in zip(gradients, ctx.shapes, strict=True)
    ], None


def _vmap(info: Any, in_dims: tuple[Sequence[int | None], None], ins: Sequence[Tensor], program: str) -> tuple[list[Tensor], list[int]]:
    """A mapped dimension is one more dimension of rows, in front."""
    parsed = parse(program)
    tensors, mapped = [], []
    for tensor, dim in zip(ins, in_dims[0], strict=True):
        mapped.append(dim is not None)
        if dim is not None:
            tensor = tensor.movedim(dim, 0)
            missing = parsed.rank + 2 - tensor.dim()
            tensor = tensor[(slice(None), *(None,) * missing)] if missing else tensor
        tensors.append(tensor)
    outputs = rows(tensors, str(with_leading_rows(parsed, mapped)))
    return outputs, [0] * len(outputs)


def with_leading_rows(program: Program, mapped: Sequence[bool]) -> Program:
    """The program over one more leading dimension of rows, over which the flagged arguments vary."""
    return replace(
        program,
        rank=program.rank + 1,
        arguments=tuple(
            replace(a, rows=(flag, *a.rows)) for a, flag in zip(program.arguments, mapped, strict=True)
        ),
        outputs=tuple(replace(o, rows=(True, *o.rows)) for o in program.outputs),
    )


LIBRARY.impl("rows", _run_rows, "CPU")
LIBRARY.impl("rows", _run_rows, "CUDA")
torch.library.register_fake("fxfuse::rows", fake_rows, lib=LIBRARY)
torch.library.register_autograd("fxfuse::rows", _backward, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_vmap("fxfuse::rows", _vmap, lib=LIBRARY)
