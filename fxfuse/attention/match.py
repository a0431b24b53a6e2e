"""Finding attention that a model writes out: a region between two products, of queries and keys, and with the values.

The region's program reads the scores row by row and gives weights; what else it reads (masks, biases) it reads as operands. Keys and
values that are repeated for the heads of a group are taken before the repetition.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ..canonical.facts import known_dtype, known_shape, module_path, same_size, statically_one, tensor_of
from ..canonical.vocabulary import aten
from ..program import Program
from ..regions import Region
from ..regions.fusible import epochs_of
from ..regions.region import ArgumentView, OutputView

PRODUCTS = (torch.matmul, aten.matmul.default, torch.Tensor.matmul)
_SWAPPED = [0, 1, 3, 2]


@dataclass(frozen=True)
class Written:
    """An attention as it is written: nodes of the two products, the region between them, and the operands of the op.

    key, value: [b, kv, n, width], where kv divides the heads of the query
    """

    product: fx.Node
    region: Region
    result: fx.Node
    query: fx.Node
    key: fx.Node
    key_swapped: bool  # the key node is [b, kv, width, n]
    value: fx.Node
    scores: str

    @property
    def program(self) -> Program:
        return self.region.program

    @property
    def module(self) -> str:
        return module_path(self.product)

    @property
    def others(self) -> list[ArgumentView]:
        """What the region reads beside the scores, in the program's order."""
        views = zip(self.region.arguments, self.program.arguments, strict=True)
        return [view for view, argument in views if argument.name != self.scores]


@dataclass(frozen=True)
class NotFused:
    """An attention that stays as it is written, and why."""

    module: str
    reason: str
    program: str = ""


def is_product(node: fx.Node) -> bool:
    """A product of two batches of matrices, [b, h, ., .] each."""
    if node.op not in ("call_function", "call_method") or len(node.args) != 2 or node.kwargs:
        return False
    if node.target not in PRODUCTS and not (node.op == "call_method" and node.target == "matmul"):
        return False
    shapes = [tensor_of(arg) for arg in node.args]
    return all(t is not None and t.dim() == 4 for t in shapes)


def find_written(gm: fx.GraphModule, regions: Sequence[Region], differentiable: Collection[fx.Node]) -> Iterator[Written | NotFused]:
    """Every attention that is written out, or why it stays so."""
    epochs = epochs_of(gm.graph)
    for region in regions:
        for view, argument in zip(region.arguments, region.program.arguments, strict=True):
            if is_product(view.node) and argument.kind == "real" and argument.columns is not None:
                results = [(out, user) for out in region.outputs for user in out.node.users
                           if is_product(user) and user.args[0] is out.node]
                if len(results) == 1:
                    yield _written(region, view, argument.name, *results[0], differentiable, epochs)
                    break


def _written(region: Region, view: ArgumentView, scores: str, weights: OutputView, result: fx.Node,
             differentiable: Collection[fx.Node], epochs: dict[fx.Node, int]) -> Written | NotFused:
    product = view.node
    reason = _obstacle(region, view, scores, weights, result, differentiable, epochs)
    query, second, third = product.args[0], product.args[1], result.args[1]
    assert isinstance(query, fx.Node)
    assert isinstance(second, fx.Node)
    assert isinstance(third, fx.Node)
    swapped = second.target is aten.permute.default and list(second.args[1]) == _SWAPPED  # type: ignore[arg-type]
    key = second.args[0] if swapped else second
    if not reason and any(not same_size(known_shape(n)[0], known_shape(query)[0]) for n in (key, third)):
        reason = "keys, values and queries are of different batches"
    if not reason and any(not same_size(known_shape(n)[1], known_shape(query)[1]) for n in (key, third)):
        reason = "keys, values and queries have different numbers of heads"
    if reason:
        return NotFused(module_path(product), reason, str(region.program))
    once = (before_repetition(key), before_repetition(third))
    if swapped and same_size(known_shape(once[0])[1], known_shape(once[1])[1]):
        key, third = once
    return Written(product, region, result, query, key, not swapped, third, scores)


def _obstacle(region: Region, view: ArgumentView, scores: str, weights: OutputView, result: fx.Node,
              differentiable: Collection[fx.Node], epochs: dict[fx.Node, int]) -> str:
    """Why the scores are kept, or nothing."""
    program = region.program
    if len(region.outputs) != 1 or len(program.outputs) != 1 or set(weights.node.users) != {result}:
        return "its weights are read by something else than the product with the values"
    members = set(region.nodes)
    if any(user not in members for user in view.node.users):
        return "its scores are read by something else than the function that makes weights of them"
    columns = program.argument(scores).columns
    whole = program.rank == 3 and len(program.axes) == 1 and columns == program.axes[0][0] == program.outputs[0].columns
    straight = all(v.layout.dims == tuple(range(3)) and v.layout.column for v in (view, weights))
    if not whole or not straight:
        return "its scores are looked at in another order or in parts"
    for other, argument in zip(region.arguments, program.arguments, strict=True):
        if argument.name == scores:
            continue
        if other.node in differentiable and argument.kind == "real":
            return f"{other.node.name}, which it reads beside the scores, needs a gradient as well"
        if isinstance(argument.columns, int):
            return f"{other.node.name} is looked at in parts"
    if len({epochs[node] for node in (view.node, *region.nodes, result)}) > 1:
        return "something with an effect stands between its products"
    if known_dtype(view.node) != known_dtype(result):
        return "its two products are computed in different dtypes"
    return ""


def before_repetition(node: fx.Node) -> fx.Node:
    """The heads that a node repeats for each group, [b, kv, n, w], or the node itself: reshape(expand(unsqueeze(x, 2)))."""
    if node.target is not aten.reshape.default or not isinstance(node.args[0], fx.Node):
        return node
    wide = node.args[0]
    if wide.target is aten.clone.default and isinstance(wide.args[0], fx.Node):
        wide = wide.args[0]
    if wide.target is not aten.expand.default or not isinstance(wide.args[0], fx.Node):
        return node
    once = wide.args[0]
    if once.target is not aten.unsqueeze.default or once.args[1] not in (2, -3):
        return node
    before, repeated, after = once.args[0], known_shape(wide), known_shape(node)
    if not isinstance(before, fx.Node) or len(repeated) != 5 or len(after) != 4 or not statically_one(known_shape(once)[2]):
        return node
    folded = (repeated[0], repeated[1] * repeated[2], repeated[3], repeated[4])
    return before if all(same_size(a, b) for a, b in zip(folded, after, strict=True)) else node
