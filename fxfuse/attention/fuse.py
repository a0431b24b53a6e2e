"""The rule ``attention`` on a graph: written-out attention found, checked, replaced, each site with its record."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import fx

from .._torch import FakeTensor
from ..canonical.facts import known_dtype, known_shape, known_tensor, size_hint
from ..canonical.vocabulary import CAST, aten
from ..lowering import implementation_on
from ..program import Program
from ..regions import Region, find_regions
from ..regions.layout import Layout
from ..regions.region import ArgumentView, call
from ..reporting.records import Site
from ..surgery import erase_dead, erase_unused, sort_topologically
from .checking import check
from .choice import CHUNKS, FLEX, Sizes, chosen
from .flex_op import flex_attention
from .match import NotFused, Written, find_written, is_product
from .op import attention
from .programs import with_statistics
from .sinks import write_sinks_by_row

RULE = "attention"
_KEPT = ("nn_module_stack", "stack_trace", "source_fn_stack", "seq_nr", "custom")


@dataclass(frozen=True)
class Wishes:
    """use: for the name of a rule, why it is not used, or nothing; foreign: for a region, why its tensors cannot go into a kernel;
    validate, strict, tell: as for every rule."""

    use: Callable[[str], str]
    foreign: Callable[[Region], str]
    validate: str
    strict: bool
    tell: Callable[[str, Exception | None], None]


def fuse_attention(gm: fx.GraphModule, differentiable: Callable[[], Collection[fx.Node]], wishes: Wishes) -> list[Site]:
    """Replace every attention that is written out, in place."""
    if sum(is_product(node) for node in gm.graph.nodes) < 2:
        return []
    if not wishes.use(RULE):
        write_sinks_by_row(gm)
    sites = []
    for found in list(find_written(gm, find_regions(gm)[0], differentiable())):
        if isinstance(found, NotFused):
            sites.append(Site(RULE, found.module, "declined", found.reason, program=found.program))
        else:
            sites.append(_fuse(gm, found, wishes))
    if any(site.status == "fused" for site in sites):
        sort_topologically(gm.graph)
        erase_dead(gm.graph)
        gm.graph.lint()
    return sites


def _fuse(gm: fx.GraphModule, found: Written, wishes: Wishes) -> Site:
    """Replace one, or say why not. An internal error declines the site (and is raised when strict)."""
    site = Site(RULE, found.module, "declined", wishes.use(RULE) or wishes.foreign(_with_operands(found)))
    if site.reason:
        return site
    device = known_tensor(found.query).device
    try:
        program = with_statistics(plain_program(found), found.scores)
        verdict = check(found, program, device, wishes.validate)
        site.reason, site.error_ratio = verdict.reason, verdict.error_ratio
        if site.reason:
            wishes.tell(f"{RULE} at {site.module or 'the top'} was left as it was: {site.reason}", None)
            return site
        way, why = chosen(str(program), found.scores, _sizes(found), known_dtype(found.result), device)
        replace_written(gm.graph, found, program, way)
    except Exception as error:
        if wishes.strict:
            raise
        site.reason = f"internal error: {type(error).__name__}: {error}"
        wishes.tell(f"{RULE} at {site.module or 'the top'} was left as it was: {site.reason}", error)
        return site
    site.status, site.program = "fused", str(program)
    site.implementation = "FlexAttention" if way == FLEX else f"chunks of queries, products and {implementation_on(device.type)}"
    site.reason = why if device.type == "cuda" else ""
    return site


def _sizes(found: Written) -> Sizes:
    """The sizes of a site; those that change are those that it was captured with."""
    query, value = (tuple(map(size_hint, known_shape(node))) for node in (found.query, found.value))
    return Sizes(query[0], query[1], value[1], query[2], value[2], query[3], value[3])


def plain_program(found: Written) -> Program:
    """The region's program over any number of keys, its weights in the dtype of the product with the values."""
    dtype = str(known_dtype(found.result)).removeprefix("torch.")
    program = replace(found.program, axes=tuple((name, None) for name, _ in found.program.axes))
    return replace(program, outputs=(replace(program.outputs[0], dtype=dtype),)).verify()


def replace_written(graph: fx.Graph, found: Written, program: Program, way: str = CHUNKS) -> fx.Node:
    """Put the op in place of both products and the region; what stands for the result now."""
    dtype = known_dtype(found.result)
    with graph.inserting_before(found.result):
        key = found.key
        if found.key_swapped:
            key = call(graph, found.product, aten.permute.default, key, [0, 1, 3, 2])
        operands = [_in_dtype(graph, found, node, dtype) for node in (found.query, key, found.value)]
        others = [view.insert(graph) for view in found.others]
        target, rest = (flex_attention, others) if way == FLEX else (attention, [others])
        anchor = graph.call_function(target, (*operands, *rest, str(program), found.scores))
        _describe(anchor, found)
        result = graph.call_function(operator.getitem, (anchor, 0))
    result.meta = {**found.result.meta, "example_value": anchor.meta["example_value"][0]}
    found.result.replace_all_uses_with(result)
    erase_unused([found.product, *found.region.nodes, found.result])
    return result


def _in_dtype(graph: fx.Graph, found: Written, operand: fx.Node, dtype: torch.dtype) -> fx.Node:
    """An operand in the dtype that the products compute in: autocast leaves no casts in a graph."""
    return operand if known_dtype(operand) == dtype else call(graph, found.product, CAST, operand, dtype)


def _describe(anchor: fx.Node, found: Written) -> None:
    """What the op gives, as facts for later readers of the graph."""
    anchor.meta = {key: value for key, value in found.result.meta.items() if key in _KEPT}
    arguments = fx.map_arg(anchor.args, lambda node: known_tensor(node))
    query = arguments[0]
    with query.fake_mode if isinstance(query, FakeTensor) else nullcontext(), torch.no_grad():
        anchor.meta["example_value"] = anchor.target(*arguments)  # type: ignore[operator]


def _with_operands(found: Written) -> Region:
    """The region with the products' operands among what it reads."""
    operands = [ArgumentView(node, Layout(()), 0) for node in (found.query, found.key, found.value)]
    return replace(found.region, arguments=[*operands, *found.region.arguments])
