"""``c + s * (h B')`` with a short contraction becomes ``addmm(c, h, B', alpha=s)``, in the canonical graph, before autograd.

Written like that, the rest follows: the derivatives of addmm are matmuls with thin results, and autograd multiplies those by s, so
neither ``s * (h B')`` nor ``s * dY`` is ever formed, forward or backward; the products stay associated as ``(x A') B'``; and after the
partition the addmm accumulates into c's own buffer. Fewer roundings than before: the term, its multiple and the sum are rounded once.

c has to be the result of a matmul too: a sum with anything else is better left to the row programs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..canonical.facts import dtype_of, known_tensor, module_path, provenance, record, same_sizes, tensor_of
from ..canonical.vocabulary import CAST
from ..regions.fusible import NOT_FUSED, epochs_of
from ..reporting.records import Site
from .casts import cancel_casts
from .check import agrees
from .expression import ThinTerm, argument, is_linear, is_low_rank, is_wide_product, read_thin_term, widening

logger = logging.getLogger("fxfuse")

aten = torch.ops.aten
RULE = "lora_linear"
SUM = aten.add.Tensor
_VIEWS = (aten.reshape.default, aten.permute.default)


def rewrite_products(gm: fx.GraphModule, use: Callable[[str], str], validate: str, strict: bool = False) -> list[Site]:
    """Rewrite the sums of a canonical graph, in place; returns what was found. ``strict``: raise on an internal error."""
    graph = gm.graph
    if not use(RULE):
        cancel_casts(graph)
    epochs = epochs_of(graph)
    sites: list[Site] = []
    for node in list(graph.nodes):
        for wide, operand in _readings(node):
            term = read_thin_term(operand)
            if term is None or not is_low_rank(term):
                continue
            site = Site(RULE, module_path(node), "declined")
            site.reason = use(RULE) or _obstacle(node, wide, term, epochs)
            if not site.reason:
                try:
                    site.reason, site.error_ratio = _rewrite(graph, node, wide, term, validate)
                except Exception as error:
                    if strict:
                        raise
                    site.reason = f"internal error: {type(error).__name__}: {error}"
                    logger.error("%s at %s: %s", RULE, site.module or "the top", site.reason, exc_info=error)
            if not site.reason:
                site.status, site.implementation = "fused", "torch"
            sites.append(site)
            break
    if not use(RULE):
        cancel_casts(graph)  # of sums that are 16 bits now, and are read so
        _leave_to_sums(graph)
    return sites


def _readings(node: fx.Node) -> list[tuple[Any, Any]]:
    """The two operands of a plain sum, either of which may be the thin term."""
    if node.op != "call_function" or node.target is not SUM or len(node.args) != 2 or node.kwargs:
        return []
    first, second = node.args
    if tensor_of(first) is None or tensor_of(second) is None:
        return []
    return [(first, second), (second, first)]


def _obstacle(node: fx.Node, wide: fx.Node, term: ThinTerm, epochs: dict[fx.Node, int]) -> str:
    """Why a sum that looks like a wide product and a thin one is left as it is, or nothing."""
    if not is_wide_product(wide):
        return f"what the thin product is added to ({wide.name}) is not the result of a matmul"
    if not same_sizes(known_tensor(wide).shape, known_tensor(node).shape) or not same_sizes(
            known_tensor(term.product).shape, known_tensor(node).shape):
        return "the sum broadcasts one of its terms"
    dtypes = {dtype_of(n) for n in (node, wide, term.product)}
    if len(dtypes) > 1 and not (_mixed(node, wide, term) or _widened(node, wide, term)):
        names = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
        return f"its products are of different dtypes ({names})"
    if len({epochs[n] for n in (node, *term.nodes)}) > 1:
        return "autocast, the gradient mode or a tensor is changed between its products"
    return ""


def _mixed(node: fx.Node, wide: fx.Node, term: ThinTerm) -> bool:
    """Is a float32 term added to a bfloat16 matrix, and the sum (or before it the term) rounded to bfloat16: splitting.py takes it."""
    if dtype_of(wide) != torch.bfloat16 or dtype_of(term.product) != torch.float32:
        return False
    return dtype_of(node) == torch.bfloat16 or all(
        user.target is SUM or (user.target is CAST and dtype_of(user) == torch.bfloat16) for user in node.users)


def _widened(node: fx.Node, wide: fx.Node, term: ThinTerm) -> bool:
    """Are two 16-bit products added in a wider dtype: layers that give back the dtype they were given, under autocast."""
    return widening(wide) and dtype_of(wide) == dtype_of(node) and dtype_of(wide.args[0]) == dtype_of(term.product)


def _factors_of(wide: fx.Node) -> list[fx.Node]:
    """What a widened product is made of. Rounding the sum again is within limits beside the product's own rounding, not without it."""
    while wide.target is CAST or wide.target in (aten.reshape.default, aten.view_as.default):
        wide = wide.args[0]  # type: ignore[assignment]
    return [factor for factor in wide.args if isinstance(factor, fx.Node)] if is_linear(wide) else [wide]


def _keep_apart(node: fx.Node, term: ThinTerm) -> None:
    """Leave the casts around a float32 term to splitting.py: of x to float32, of the sum to bfloat16."""
    for user in node.users:
        if user.target is CAST:
            user.meta[NOT_FUSED] = True
    source: Any = argument(term.left, 0, "input") if is_linear(term.left) else None
    if widening(source) and all(is_linear(user) for user in source.users):
        source.meta[NOT_FUSED] = True


def _rewrite(graph: fx.Graph, node: fx.Node, wide: fx.Node, term: ThinTerm, validate: str) -> tuple[str, float | None]:
    """Put the addmm in place of the sum if it computes the same; else the reason why it does not."""
    made: list[fx.Node] = []

    def make(target: Any, args: tuple, value: Any, **kwargs: Any) -> fx.Node:
        made.append(graph.call_function(target, args, kwargs))
        made[-1].meta = provenance(node)
        record(made[-1], value, like=node)
        return made[-1]

    leaves = [wide, term.left, term.weight]
    if _widened(node, wide, term):
        leaves = [*_factors_of(wide), term.left, term.weight]
        wide = wide.args[0]  # type: ignore[assignment]
    known, left, weight = known_tensor(wide), known_tensor(term.left), known_tensor(term.weight)
    columns, contraction = term.sizes
    mixed = known.dtype != weight.dtype and known_tensor(term.product).dtype != known.dtype
    with graph.inserting_before(node):
        rows = make(CAST, (wide, torch.float32), known.float()) if mixed else wide
        if known.dim() != 2:
            rows = make(aten.reshape.default, (rows, [-1, columns]), known_tensor(rows).reshape(-1, columns))
        thin = term.left if left.dim() == 2 else make(
            aten.reshape.default, (term.left, [-1, contraction]), left.reshape(-1, contraction))
        across = make(aten.t.default, (term.weight,), weight.t())
        result = make(torch.addmm, (rows, thin, across), known_tensor(rows), alpha=term.factor)
        if known.dim() != 2:
            result = make(aten.view_as.default, (result, wide), known_tensor(result).view_as(known))
        if known_tensor(node).dtype != known_tensor(result).dtype:
            result = make(CAST, (result, known_tensor(node).dtype), known_tensor(node))
    verdict = agrees([node], [result], list(dict.fromkeys(leaves)), gradients=True, mode=validate)
    if verdict.reason:
        for fresh in reversed(made):
            graph.erase_node(fresh)
        return verdict.reason, None
    record(result, known_tensor(node), like=node)
    node.replace_all_uses_with(result)
    if mixed:
        for fresh in made:
            fresh.meta[NOT_FUSED] = True
        _keep_apart(result, term)
    for old in (node, *term.nodes):
        graph.erase_node(old)
    if widening(result) and not mixed:
        _sink(result)
    return "", verdict.error_ratio


def _sink(cast: fx.Node) -> None:
    """Move a cast below the views that follow it, to where it can become part of what reads them (a rotary embedding)."""
    graph = cast.graph
    while len(cast.users) == 1 and (view := next(iter(cast.users))).target in _VIEWS and view.args[0] is cast:
        narrow, value = cast.args[0], known_tensor(view)
        with graph.inserting_before(view):
            moved = graph.call_function(view.target, (narrow, *view.args[1:]), view.kwargs)  # type: ignore[arg-type]
            below = graph.call_function(CAST, (moved, value.dtype))
        for fresh, found in ((moved, value.to(known_tensor(narrow).dtype)), (below, value)):
            fresh.meta = provenance(view)
            record(fresh, found, like=view)
        view.replace_all_uses_with(below)
        graph.erase_node(view)
        graph.erase_node(cast)
        cast = below


def _leave_to_sums(graph: fx.Graph) -> None:
    """A sum of a wide tensor and a product that was widened for it widens by itself, and the copy is not made."""
    sums = (torch.addmm, aten.view_as.default)
    for cast in [n for n in graph.nodes if n.target is CAST and widening(n) and n.args[0].target in sums]:
        for user in list(cast.users):
            others = [operand for operand in user.all_input_nodes if operand is not cast]
            if user.target is SUM and others and dtype_of(others[0]) == dtype_of(user) == dtype_of(cast):
                user.replace_input_with(cast, cast.args[0])  # type: ignore[arg-type]
        if not cast.users:
            graph.erase_node(cast)
