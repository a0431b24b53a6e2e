"""Weights of rows go through a product to its narrow side: ``w * (a W_e) = (w * a) W_e``, for the grouped products of experts.

An expert layer weighs what each expert gives for a token. Written behind the last product, that reads and writes rows of the model's
width, and the gradient of the weights needs those rows again, so they are kept. Before the product the rows are as narrow as the
expert is, the factor is one more in the kernel of the gate, and nothing is kept: the gate is computed again from what it read. The rows
are rounded once either way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import fx

from ..canonical.facts import (
    dtype_of,
    module_path,
    requires_grad,
    same_size,
    shape_of,
    static_size,
    statically_one,
)
from ..canonical.vocabulary import aten
from ..regions.region import call
from ..reporting.records import Site

RULE = "row_weights"
_GROUPED = tuple(f for f in (getattr(torch, "_grouped_mm", None), getattr(torch.nn.functional, "grouped_mm", None),
                             aten._grouped_mm.default) if f is not None)


def weigh_before_products(gm: fx.GraphModule, differentiable: Callable[[], Collection[fx.Node]],
                          use: Callable[[str], str]) -> list[Site]:
    """Rewrite what is found in a graph, in place."""
    found = [(node, *parts) for node in gm.graph.nodes if (parts := _weighed(node)) is not None]
    if not found:
        return []
    trained, sites = differentiable(), []
    for node, product, weights in found:
        if weights not in trained:
            continue
        site = Site(RULE, module_path(node), "declined", use(RULE))
        sites.append(site)
        if not site.reason:
            _replace(gm.graph, node, product, weights)
            site.status, site.implementation = "fused", "in the kernel before the product"
    return sites


def _weighed(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(a grouped product that is only weighed, the weights of its rows [s, 1]) of a multiplication."""
    if node.target is not aten.mul.Tensor or len(node.args) != 2:
        return None
    for product, weights in (node.args, node.args[::-1]):
        if isinstance(product, fx.Node) and isinstance(weights, fx.Node) and _is_narrow_product(product, node) \
                and _are_weights(weights, product):
            return product, weights
    return None


def _is_narrow_product(product: fx.Node, user: fx.Node) -> bool:
    """Rows [s, narrow] by groups into [s, wide], nothing else, read by ``user`` alone."""
    if product.target not in _GROUPED or set(product.users) != {user} or len(product.args) != 2:
        return False
    if any(product.kwargs.get(name) is not None for name in ("bias", "out_dtype")) or product.kwargs.get("offs") is None:
        return False
    rows, result = shape_of(product.args[0]), shape_of(product)
    if rows is None or result is None or len(rows) != 2 or len(result) != 2 or dtype_of(product.args[0]) != dtype_of(product):
        return False
    narrow, wide = static_size(rows[1]), static_size(result[1])
    return narrow is not None and wide is not None and narrow <= wide


def _are_weights(weights: fx.Node, product: fx.Node) -> bool:
    shape, rows = shape_of(weights), shape_of(product)
    return (shape is not None and rows is not None and len(shape) == 2 and statically_one(shape[1]) and same_size(shape[0], rows[0])
            and dtype_of(weights) == dtype_of(product) and requires_grad(weights))


def _replace(graph: fx.Graph, node: fx.Node, product: fx.Node, weights: fx.Node) -> None:
    with graph.inserting_before(node):
        rows = call(graph, node, aten.mul.Tensor, product.args[0], weights)
        weighed = graph.call_function(product.target, (rows, product.args[1]), dict(product.kwargs))  # type: ignore[arg-type]
    weighed.meta = {**node.meta}
    node.replace_all_uses_with(weighed)
    graph.erase_node(node)
    graph.erase_node(product)
