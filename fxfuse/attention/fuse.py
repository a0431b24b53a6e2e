"""The rule ``attention`` on a graph: written-out attention found, checked, replaced, each site with its record."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from dataclasses import replace

import torch
from torch import fx

from ..anchored import Wishes, attempt, describe, with_operands
from ..canonical.facts import known_dtype, known_tensor
from ..canonical.vocabulary import CAST, aten
from ..lowering import implementation_on
from ..program import Program
from ..regions import find_regions
from ..regions.region import call
from ..reporting.records import Site
from ..surgery import erase_dead, erase_unused, sort_topologically
from .checking import check
from .choice import why_not_flex
from .flex_op import flex_attention
from .layouts import tell
from .match import NotFused, Written, find_written, is_product
from .op import attention
from .programs import with_statistics
from .sinks import write_sinks_by_row

RULE = "attention"
UNDECIDED = "FlexAttention is tried beside the training where it can save time"


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
    """Replace one, or say why not."""
    operands = (found.query, found.key, found.value)
    site = Site(RULE, found.module, "declined", wishes.use(RULE) or wishes.foreign(with_operands(found.region, operands)))
    if site.reason:
        return site
    device = known_tensor(found.query).device

    def put(program: Program) -> None:
        text = str(program)
        reason = why_not_flex(text, found.scores, known_dtype(found.result), device)
        replace_written(gm.graph, found, program, may_be_flex=not reason)
        site.implementation = f"chunks of queries, products and {implementation_on(device.type)}"
        site.reason, site.program = (reason or UNDECIDED) if device.type == "cuda" else "", text
        if not reason:
            tell(text, site)

    attempt(site, wishes, lambda: with_statistics(plain_program(found), found.scores),
            lambda program: check(found, program, device, wishes.validate), put)
    return site


def plain_program(found: Written) -> Program:
    """The region's program over any number of keys, its weights in the dtype of the product with the values."""
    dtype = str(known_dtype(found.result)).removeprefix("torch.")
    program = replace(found.program, axes=tuple((name, None) for name, _ in found.program.axes))
    return replace(program, outputs=(replace(program.outputs[0], dtype=dtype),)).verify()


def replace_written(graph: fx.Graph, found: Written, program: Program, may_be_flex: bool = False) -> fx.Node:
    """Put the op in place of both products and the region; what stands for the result now."""
    dtype = known_dtype(found.result)
    with graph.inserting_before(found.result):
        key = found.key
        if found.key_swapped:
            key = call(graph, found.product, aten.permute.default, key, [0, 1, 3, 2])
        operands = [_in_dtype(graph, found, node, dtype) for node in (found.query, key, found.value)]
        others = [view.insert(graph) for view in found.others]
        target, rest = (flex_attention, others) if may_be_flex else (attention, [others])
        anchor = graph.call_function(target, (*operands, *rest, str(program), found.scores))
        describe(anchor, found.result)
        result = graph.call_function(operator.getitem, (anchor, 0))
    result.meta = {**found.result.meta, "example_value": anchor.meta["example_value"][0]}
    found.result.replace_all_uses_with(result)
    erase_unused([found.product, *found.region.nodes, found.result])
    return result


def _in_dtype(graph: fx.Graph, found: Written, operand: fx.Node, dtype: torch.dtype) -> fx.Node:
    """An operand in the dtype that the products compute in: autocast leaves no casts in a graph."""
    return operand if known_dtype(operand) == dtype else call(graph, found.product, CAST, operand, dtype)
