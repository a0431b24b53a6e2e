"""Sinks: one more score for every query that takes weight and has no value, written as a column that is dropped behind the softmax.

    softmax([scores, sink])[..., :-1]   =   softmax(scores) * sigmoid(logsumexp(scores) - sink)

The right side works on the scores alone, row by row, so it is a row program like that of any other attention.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..canonical.facts import known_dtype, known_shape, same_size, statically_one, tensor_of, value_of
from ..canonical.vocabulary import CAST, aten
from ..regions.region import call
from ..surgery import erase_unused

_SOFTMAX = (aten.softmax.int, aten._softmax.default)


def write_sinks_by_row(gm: fx.GraphModule) -> int:
    """Rewrite every softmax whose last column is a sink, in place; returns how many."""
    count = 0
    for node in [n for n in gm.graph.nodes if n.op == "call_function" and n.target is aten.slice.Tensor]:
        found = _sink_of(node)
        if found is not None:
            scores, sink, members = found
            _replace(gm.graph, node, scores, sink)
            erase_unused([node, *members])
            count += 1
    return count


def _sink_of(sliced: fx.Node) -> tuple[fx.Node, fx.Node, list[fx.Node]] | None:
    """(scores, sink, the nodes that go), where a slice drops the last column of a softmax over a concatenation of both."""
    softmax, dim, start, end, *step = sliced.args
    if not isinstance(softmax, fx.Node) or softmax.target not in _SOFTMAX or start not in (0, None) or step not in ([], [1]):
        return None
    last = len(known_shape(softmax)) - 1
    if dim not in (-1, last) or softmax.args[1] not in (-1, last) or len(softmax.users) != 1:
        return None
    members: list[fx.Node] = [softmax]
    joined = softmax.args[0]
    if isinstance(joined, fx.Node) and joined.target is aten.sub.Tensor and len(joined.users) == 1:
        whole, most = joined.args[:2]
        if not _is_maximum(most, whole):
            return None
        members += [joined, most, most.args[0]]  # type: ignore[list-item, union-attr]
        joined = whole
    if not isinstance(joined, fx.Node) or joined.target is not aten.cat.default or any(u not in members for u in joined.users):
        return None
    parts, at = joined.args[0], joined.args[1] if len(joined.args) > 1 else 0
    if at not in (-1, last) or len(parts) != 2 or not statically_one(known_shape(parts[1])[-1]):  # type: ignore[arg-type, index]
        return None
    scores, sink = parts[0], parts[1]  # type: ignore[index]
    end = value_of(end) if isinstance(end, fx.Node) else end
    if end != -1 and not same_size(end, known_shape(scores)[-1]):
        return None
    return scores, sink, [*members, joined]  # type: ignore[return-value]


def _is_maximum(node: Any, of: Any) -> bool:
    """The maximum of each row, which a softmax does not change with."""
    if not isinstance(node, fx.Node):
        return False
    if node.target is aten.amax.default:
        return node.args[0] is of
    pair = node.args[0] if node.target is operator.getitem and node.args[1] == 0 else None
    if not isinstance(pair, fx.Node) or pair.args[0] is not of or len(pair.users) != 1:
        return False
    keeps = pair.kwargs.get("keepdim", pair.args[2] if len(pair.args) > 2 else False)
    along = pair.kwargs.get("dim", pair.args[1] if len(pair.args) > 1 else None)
    return pair.target in ("max", torch.max, aten.max.dim) and along in (-1, len(known_shape(of)) - 1) and keeps is True


def _replace(graph: fx.Graph, sliced: fx.Node, scores: fx.Node, sink: fx.Node) -> None:
    wide = torch.float64 if known_dtype(scores) == torch.float64 else torch.float32
    if sink.target is aten.expand.default and tensor_of(sink.args[0]) is not None:
        if len(known_shape(sink.args[0])) == len(known_shape(sink)):
            sink = sink.args[0]  # type: ignore[assignment]

    def to(node: fx.Node, dtype: torch.dtype) -> fx.Node:
        return node if known_dtype(node) == dtype else call(graph, sliced, CAST, node, dtype)

    with graph.inserting_before(sliced):
        whole = to(scores, wide)
        weights = call(graph, sliced, aten.softmax.int, whole, -1, wide)
        left = call(graph, sliced, aten.sub.Tensor, call(graph, sliced, aten.logsumexp.default, whole, [-1], True), to(sink, wide))
        result = to(call(graph, sliced, aten.mul.Tensor, weights, call(graph, sliced, aten.sigmoid.default, left)), known_dtype(sliced))
    sliced.replace_all_uses_with(result)
