"""The op: ``fxfuse::linear_loss``, a linear and the row program over its logits, in one of four modes.

    value       no gradient is wanted: losses only
    total       the weighted sum of the first output's rows is differentiable, the rows are not. Gradients of the operands are computed
                in the forward, for a cotangent of 1; the backward multiplies them by the real one, one number on the device
    rows        the first output's rows are differentiable, weights are frozen: the same for the hidden states, one number a row
    recompute   all rows are differentiable: the backward computes the logits again

Gradients that the forward stores are of the *sum*: no 1/N is in them, so that the hidden
states' fit float16. They are outputs of the op, so
that every tracer sees what is kept. Nothing here differentiates by hand: programs come from ``derive_backward``, products from
the transposes in products.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..derivation import cotangent_name
from ..errors import DoubleBackwardError
from ..fused_op import LIBRARY, differentiable_arguments, rows
from ..program import Program, parse
from ..residuals import saved_names
from .adjoint import scaling
from .execution import OPERANDS, Factors, Head, backward, forward
from .products import left_name, right_name, stored_dtype

MODES = ("value", "total", "rows", "recompute")
STORING = ("total", "rows")

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
LIBRARY.define(
    "linear_loss(Tensor hidden, Tensor weight, Tensor? bias, Tensor[] others, Tensor? row_weight, str program, str logits, "
    "str mode, str[] wanted, Tensor[] lefts, Tensor[] rights, float[] factors) -> Tensor[]",
    tags=_TAGS,
)
LIBRARY.define(
    "linear_loss_backward(Tensor hidden, Tensor weight, Tensor? bias, Tensor[] others, Tensor[] cotangents, Tensor[] saved, "
    "str program, str logits, str[] outputs, str[] wanted, Tensor[] lefts, Tensor[] rights, float[] factors) -> Tensor[]",
    tags=_TAGS,
)
linear_loss = torch.ops.fxfuse.linear_loss.default
linear_loss_backward = torch.ops.fxfuse.linear_loss_backward.default


def _run(hidden: Tensor, weight: Tensor, bias: Tensor | None, others: Sequence[Tensor], row_weight: Tensor | None, program: str,
         logits: str, mode: str, wanted: Sequence[str], lefts: Sequence[Tensor] = (), rights: Sequence[Tensor] = (),
         factors: Sequence[float] = ()) -> list[Tensor]:
    stored = wanted if mode in STORING else ()
    terms = [Factors(*term) for term in zip(lefts, rights, factors, strict=True)]
    head = Head(hidden, weight, bias, others, parse(program), logits, "weight" in stored, terms)
    outputs, gradients = forward(head, row_weight, stored)
    total = [_total(outputs[0], row_weight)] if mode == "total" else []
    return [*outputs, *total, *gradients]


def _total(losses: Tensor, row_weight: Tensor | None) -> Tensor:
    return losses.sum() if row_weight is None else (losses * row_weight).sum()


def _fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, others: Sequence[Tensor], row_weight: Tensor | None, program: str,
          logits: str, mode: str, wanted: Sequence[str], lefts: Sequence[Tensor] = (), rights: Sequence[Tensor] = (),
          factors: Sequence[float] = ()) -> list[Tensor]:
    outputs = [hidden.new_empty(hidden.shape[0], 1, dtype=reference.torch_dtype(o.dtype)) for o in parse(program).outputs]
    total = [outputs[0].new_empty(())] if mode == "total" else []
    return [*outputs, *total, *(_stored_like(_named(hidden, weight, bias, lefts, rights), wanted) if mode in STORING else [])]


def is_by_row(operand: str) -> bool:
    """Has an operand (by name) a row for each row of the logits."""
    return operand == "hidden" or operand.startswith("left")


def _named(hidden: Tensor, weight: Tensor, bias: Tensor | None, lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> dict[str, Tensor]:
    """The operands of the sum that the logits are, by name."""
    named = {name: t for name, t in zip(OPERANDS, (hidden, weight, bias), strict=True) if t is not None}
    for k, (left, right) in enumerate(zip(lefts, rights, strict=True)):
        named |= {left_name(k): left, right_name(k): right}
    return named


def _stored_like(named: dict[str, Tensor], wanted: Sequence[str]) -> list[Tensor]:
    """Gradients as the loop leaves them."""
    return [torch.empty_like(named[name], dtype=named[name].dtype if is_by_row(name) else stored_dtype(named[name].dtype))
            for name in wanted]


def _run_backward(hidden: Tensor, weight: Tensor, bias: Tensor | None, others: Sequence[Tensor], cotangents: Sequence[Tensor],
                  saved: Sequence[Tensor], program: str, logits: str, outputs: Sequence[str], wanted: Sequence[str],
                  lefts: Sequence[Tensor] = (), rights: Sequence[Tensor] = (), factors: Sequence[float] = ()) -> list[Tensor]:
    parsed = parse(program)
    terms = [Factors(*term) for term in zip(lefts, rights, factors, strict=True)]
    head = Head(hidden, weight, bias, others, parsed, logits, "weight" in wanted, terms)
    arrived = dict(zip(outputs, cotangents, strict=True))
    found = backward(head, arrived, dict(zip(_statistics(parsed, logits), saved, strict=True)), wanted)
    named = _named(hidden, weight, bias, lefts, rights)
    return [gradient.to(named[name].dtype) for name, gradient in zip(wanted, found, strict=True)]


def _fake_backward(hidden: Tensor, weight: Tensor, bias: Tensor | None, others: Sequence[Tensor], cotangents: Sequence[Tensor],
                   saved: Sequence[Tensor], program: str, logits: str, outputs: Sequence[str], wanted: Sequence[str],
                   lefts: Sequence[Tensor] = (), rights: Sequence[Tensor] = (), factors: Sequence[float] = ()) -> list[Tensor]:
    named = _named(hidden, weight, bias, lefts, rights)
    return [torch.empty_like(named[name]) for name in wanted]


def _statistics(program: Program, logits: str) -> tuple[str, ...]:
    """The outputs of the forward that the gradient of the logits reads."""
    names = {output.name for output in program.outputs}
    return tuple(name for name in saved_names(program, (logits,)) if name in names)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    hidden, weight, bias, others, _, text, logits, mode, wanted, lefts, rights, factors = inputs
    ctx.set_materialize_grads(False)
    ctx.text, ctx.logits, ctx.mode, ctx.others, ctx.biased = text, logits, mode, len(others), bias is not None
    ctx.dtypes = {name: t.dtype for name, t in _named(hidden, weight, bias, lefts, rights).items()}
    ctx.factors = list(factors)
    ctx.wanted = tuple(wanted)
    program = parse(text)
    if mode == "recompute":
        named = dict(zip((o.name for o in program.outputs), output, strict=False))
        ctx.save_for_backward(hidden, weight, *([bias] if ctx.biased else []), *lefts, *rights, *others,
                              *(named[name] for name in _statistics(program, logits)))
    elif mode in STORING:
        ctx.save_for_backward(*output[len(program.outputs) + (mode == "total"):])


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    program = parse(ctx.text)
    _check_cotangents(ctx.mode, grads, program, ctx.logits)
    named = _recomputed(ctx, program, grads) if ctx.mode == "recompute" else _scaled(ctx, program, grads)
    lefts, rights = ([named.get(name(k)) for k in range(len(ctx.factors))] for name in (left_name, right_name))
    no_factors: list[None] | None = None if ctx.factors else []  # torch takes an empty list for one of tensors
    return *(named.get(name) for name in OPERANDS), [None] * ctx.others, None, None, None, None, None, lefts, rights, no_factors


def _check_cotangents(mode: str, grads: Sequence[Tensor | None], program: Program, logits: str) -> None:
    """Only what the mode makes differentiable may have a cotangent: others are second derivatives, or a mistake of the matcher's."""
    count = len(program.outputs)
    constant = [k for k, o in enumerate(program.outputs) if logits not in differentiable_arguments(program, (o.name,))]
    allowed = {"value": range(0), "total": [count], "rows": [0], "recompute": range(count)}[mode]
    if any(grad is not None and index not in (*allowed, *constant) for index, grad in enumerate(grads)):
        raise DoubleBackwardError(
            f"fxfuse::linear_loss in mode {mode!r} has no derivative for one of the outputs that a gradient arrived at; second "
            "derivatives of a loss head are not computed; leave the rule out (exclude=('linear_loss',))"
        )


def _scaled(ctx: Any, program: Program, grads: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """The stored gradients times the cotangent that arrived."""
    cotangent = grads[len(program.outputs)] if ctx.mode == "total" else grads[0]
    if ctx.mode == "value" or cotangent is None:
        return {}
    factor = cotangent.reshape(1, 1) if ctx.mode == "total" else cotangent
    return {name: _times(stored, factor, ctx.dtypes[name], ctx.mode == "rows")
            for name, stored in zip(ctx.wanted, ctx.saved_tensors, strict=True)}


def _times(stored: Tensor, factor: Tensor, dtype: torch.dtype, by_row: bool) -> Tensor:
    """``stored * factor`` in the wider arithmetic, rounded once."""
    text = scaling(*(str(d).removeprefix("torch.") for d in (stored.dtype, dtype, factor.dtype)), by_row)
    matrix = stored if stored.dim() == 2 else stored.unsqueeze(0)
    return rows([matrix, factor], str(text))[0].reshape(stored.shape)


def _recomputed(ctx: Any, program: Program, grads: Sequence[Tensor | None]) -> dict[str, Tensor]:
    arrived = {o.name: grad for o, grad in zip(program.outputs, grads, strict=True)
               if grad is not None and ctx.logits in differentiable_arguments(program, (o.name,))}
    if not arrived or not ctx.wanted:
        return {}
    hidden, weight, *rest = ctx.saved_tensors
    bias = rest.pop(0) if ctx.biased else None
    lefts, rights = ([rest.pop(0) for _ in ctx.factors] for _ in range(2))
    others, saved = rest[: ctx.others], rest[ctx.others:]
    found = linear_loss_backward(hidden, weight, bias, others, list(arrived.values()), saved, ctx.text, ctx.logits, list(arrived),
                                 list(ctx.wanted), lefts, rights, ctx.factors)
    return dict(zip(ctx.wanted, found, strict=True))


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("linear_loss", _run, _device)
    LIBRARY.impl("linear_loss_backward", _run_backward, _device)
torch.library.register_fake("fxfuse::linear_loss", _fake, lib=LIBRARY)
torch.library.register_fake("fxfuse::linear_loss_backward", _fake_backward, lib=LIBRARY)
torch.library.register_autograd("fxfuse::linear_loss", _backward, setup_context=_setup_context, lib=LIBRARY)

__all__ = ["MODES", "cotangent_name", "linear_loss", "linear_loss_backward"]
