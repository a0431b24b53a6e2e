"""Slices that take a tensor apart completely, written as one split.

``chunk`` and ``split`` are read as slices, so that a region can take them in as lanes. Those that no region took are written back:
the gradient of a split is one concatenation, that of n slices is n zero-filled tensors and their sum.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

from .facts import known_shape, known_tensor, static_size, tensor_of

_SLICE = torch.ops.aten.slice.Tensor
_SPLIT = torch.ops.aten.split_with_sizes.default


def restore_splits(gm: GraphModule) -> None:
    """Replace each complete set of slices of one tensor along one dimension by a split, in place."""
    by_source: dict[tuple[Node, int], dict[Node, tuple[int, int]]] = {}
    for node in gm.graph.find_nodes(op="call_function", target=_SLICE):
        bounds = _bounds(node)
        if bounds is not None and not is_written(node) and not is_written(node.args[0]):
            by_source.setdefault((node.args[0], node.args[1]), {})[node] = bounds
    for (source, dim), slices in by_source.items():
        distinct = sorted(set(slices.values()))
        starts, ends = [b[0] for b in distinct], [b[1] for b in distinct]
        if len(distinct) > 1 and starts == [0, *ends[:-1]] and ends[-1] == static_size(known_shape(source)[dim]):
            _split(gm, source, dim, slices, distinct)


def is_written(node: Node) -> bool:
    """Is a tensor written through this node (the views that a split gives may not be)?"""
    for user in node.users:
        schema = getattr(user.target, "_schema", None)
        name = str(user.target) if user.op == "call_method" else getattr(user.target, "__name__", "")
        if (schema is not None and schema.is_mutable) or name == "setitem" or (name.endswith("_") and not name.endswith("__")):
            return True
    return False


def _split(gm: GraphModule, source: Node, dim: int, slices: dict[Node, tuple[int, int]], bounds: list[tuple[int, int]]) -> None:
    first = next(node for node in gm.graph.nodes if node in slices)
    sizes = [end - start for start, end in bounds]
    with gm.graph.inserting_before(first):
        split = gm.graph.call_function(_SPLIT, (source, sizes, dim))
        parts = {bound: gm.graph.call_function(operator.getitem, (split, i)) for i, bound in enumerate(bounds)}
    split.meta = {**first.meta, "example_value": _SPLIT(known_tensor(source), sizes, dim)}
    for i, part in enumerate(parts.values()):
        part.meta = {**first.meta, "example_value": split.meta["example_value"][i]}
    for node, bound in slices.items():
        node.replace_all_uses_with(parts[bound])
        gm.graph.erase_node(node)


def _bounds(node: Node) -> tuple[int, int] | None:
    """Start and end of a slice of step 1 with static bounds, or None."""
    tensor = tensor_of(node.args[0])
    if tensor is None or len(node.args) < 4 or (len(node.args) > 4 and node.args[4] != 1):
        return None
    dim, start, end = node.args[1:4]
    size = static_size(tensor.shape[dim]) if isinstance(dim, int) else None
    if size is None or any(isinstance(bound, Node) for bound in (start, end)):
        return None
    found = slice(start, end).indices(size)
    return found[0], found[1]
