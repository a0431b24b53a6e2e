"""Activations with a hand-written backward: where it is the derivative of the forward, a derived one may take its place.

A ``torch.autograd.Function`` may hold any backward: a straight-through estimate, a clipped or a surrogate gradient. It is replaced only
where samples show that it is what autograd makes of its forward. For every operand that a gradient is asked of, over samples at three
scales and on a grid through the usual kinks,

    in float64                 rmse(derived - written) <= ulp(float32) / 4 * rms(written)
    in the model's dtypes      error_ratio(derived, written, written in float64) <= the limit of validation

The first says that it is the same function (constants written with nine digits are; a term that is left out, or cut off somewhere, is
not); the second, that no precision is lost which the author kept, as by computing in float32. This is how a derivative is recognised,
not a check of what fxfuse does: ``validate="off"`` does not leave it out. What is put in place is then an expression as any other,
fused and validated as such.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, fx

from .applied_functions import AppliedFunction, applied_functions, inline
from .canonical.builder import Leave
from .canonical.facts import known_dtype, module_path, tensor_of
from .canonical.vocabulary import CAST
from .errors import ValidationError
from .reporting.records import Site
from .validation import LIMITS, SCALES, apart, error_ratio, same_overflow

_KEPT = "it is a torch.autograd.Function, and its backward was written by hand: it is kept, because "
_SAMPLES = 4097
_REACH = 16.0  # of the grid, whose points are 1/128 apart: 0, 1, 3, 6 are among them
_NARROW = (torch.float16, torch.bfloat16)
_FLOATS = (*_NARROW, torch.float32)
_reasons: dict[tuple, str] = {}


def derive_written_backwards(gm: fx.GraphModule) -> list[Site]:
    """Inline, in place, the pointwise functions whose backward is their derivative; a declined site for each that is not."""
    declined: list[Site] = []
    for node, function in applied_functions(gm):
        module, reason = module_path(node), function if isinstance(function, str) else _why_not(function)
        if not reason and isinstance(function, AppliedFunction):
            try:
                inline(gm, function)
            except Leave as leave:
                reason = str(leave)
        if reason:
            declined.append(Site("unnamed", module, "declined", _KEPT + reason))
    return declined


def _why_not(function: AppliedFunction) -> str:
    """Why a function's backward is not replaced, or nothing."""
    if not function.wanted():
        return ""
    key = (_text(function.forward), _text(function.backward), *function.wanted(), *sorted(function.read))
    if key not in _reasons:
        with apart():
            _reasons[key] = _difference(function)
    return _reasons[key]


def _text(body: fx.GraphModule) -> str:
    dtypes = [str(known_dtype(node)) for node in body.graph.find_nodes(op="placeholder") if tensor_of(node) is not None]
    return "\n".join([*dtypes, *(str(node.format_node()) for node in body.graph.nodes)])


def _difference(function: AppliedFunction) -> str:
    """How the written gradients differ from the derived ones, or nothing."""
    wide = dict.fromkeys(_FLOATS, torch.float64)
    instances: list[dict[torch.dtype, torch.dtype]] = [{}, dict.fromkeys(_NARROW, torch.float32)]
    names = [place.name for place in function.forward.graph.find_nodes(op="placeholder")]
    try:
        for where, samples, cotangents in _draws(function):
            exact = _gradients(function, samples, cotangents, wide)
            for i, derived, written in exact:
                _same_function(f"{where} the gradient of {names[i]}", derived, written)
            for dtypes in instances:
                found = _gradients(function, samples, cotangents, dtypes)
                for (i, ours, theirs), (_, _, truth) in zip(found, exact, strict=True):
                    _as_near(f"{where} the gradient of {names[i]}", ours, theirs, truth)
    except ValidationError as failure:
        return str(failure)
    return ""


def _same_function(where: str, derived: Tensor, written: Tensor) -> None:
    """Is the derived gradient the written one, both in float64, to a quarter of an ulp of float32."""
    if not torch.equal(derived.isfinite(), written.isfinite()):
        raise ValidationError(f"{where} is not finite where the derivative is, or the other way round")
    finite = written.isfinite()
    apart_by, size = (float(t[finite].square().mean().sqrt()) for t in (derived - written, written))
    if not apart_by <= torch.finfo(torch.float32).eps / 4 * size:
        raise ValidationError(f"{where} is not the derivative: they are {apart_by:.3g} apart where it is {size:.3g} (rms)")


def _as_near(where: str, ours: Tensor, written: Tensor, truth: Tensor) -> None:
    """Is the derived gradient as near to float64 as the written one is, in the dtypes of a model."""
    if ours.dtype != written.dtype or not same_overflow(ours, written, truth):
        raise ValidationError(f"{where} overflows in other places than the derivative would in {ours.dtype}")
    ratio, limit = error_ratio(ours, written, truth), LIMITS[ours.dtype]
    if not ratio <= limit:
        raise ValidationError(f"{where} in {ours.dtype}: the derivative's error is {ratio:.3g} times its own, {limit:g} is the limit")


def _draws(function: AppliedFunction) -> Iterator[tuple[str, list[Tensor | None], list[Tensor]]]:
    """Operands and cotangents in the model's dtypes: normal at each scale, then the grid in another order for each operand."""
    generator = torch.Generator().manual_seed(7)
    normal: Callable[[float], Tensor] = lambda scale: scale * torch.randn(_SAMPLES, generator=generator)  # noqa: E731
    grid = torch.linspace(-_REACH, _REACH, _SAMPLES)
    points: Callable[[float], Tensor] = lambda _: grid[torch.randperm(_SAMPLES, generator=generator)]  # noqa: E731
    for draw, scale, where in (*((normal, s, f"at input scale {s:g}") for s in SCALES), (points, 1.0, "on the grid")):
        places = function.forward.graph.find_nodes(op="placeholder")
        samples = [None if tensor_of(place) is None else draw(scale).to(known_dtype(place)) for place in places]
        yield where, samples, [normal(1.0).to(dtype) for dtype in function.dtypes]


def _gradients(function: AppliedFunction, samples: Sequence[Tensor | None], cotangents: Sequence[Tensor],
               dtypes: dict[torch.dtype, torch.dtype]) -> list[tuple[int, Tensor, Tensor]]:
    """For each operand that a gradient is asked of, the derived gradient and the written one, with dtypes replaced everywhere."""
    forward, backward = _retyped(function.forward, dtypes), _retyped(function.backward, dtypes)
    retype: Callable[[Tensor], Tensor] = lambda t: t.to(dtypes.get(t.dtype, t.dtype))  # noqa: E731
    leaves = [None if t is None else retype(t).requires_grad_(i in function.wanted()) for i, t in enumerate(samples)]
    given = [retype(g) if i in function.read else torch.zeros_like(retype(g)) for i, g in enumerate(cotangents)]
    values, _ = forward(*leaves)
    live = [(value, g) for i, (value, g) in enumerate(zip(values, given, strict=True)) if value is not None and value.requires_grad]
    wanted = [(i, leaf) for i, leaf in enumerate(leaves) if leaf is not None and leaf.requires_grad]
    derived = torch.autograd.grad([v for v, _ in live], [leaf for _, leaf in wanted], [g for _, g in live],
                                  materialize_grads=True) if live else [torch.zeros_like(leaf) for _, leaf in wanted]  # fmt: skip
    with torch.no_grad():
        _, saved = forward(*leaves)
        written = backward(*given, *saved)
    # A gradient takes its operand's dtype, as autograd casts it.
    zero_for_none = [torch.zeros_like(leaf) if written[i] is None else written[i].to(leaf.dtype) for i, leaf in wanted]
    return [(i, ours, theirs) for (i, _), ours, theirs in zip(wanted, derived, zero_for_none, strict=True)]


def _retyped(body: fx.GraphModule, dtypes: dict[torch.dtype, torch.dtype]) -> fx.GraphModule:
    """A copy of a canonical body whose casts are to other dtypes."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(body.graph, {}))
    for node in graph.nodes:
        if node.target is CAST:
            node.args = (node.args[0], dtypes.get(node.args[1], node.args[1]), *node.args[2:])
    return fx.GraphModule(body, graph)
