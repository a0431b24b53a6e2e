"""Small tensors that are cast alike are cast by one launch.

A block with low-rank adapters kept in float32 casts some fourteen matrices of a few hundred thousand numbers in its forward, and
gradients of theirs in its backward. Each cast alone takes a launch and a gap as long as itself.
"""

from __future__ import annotations

import operator
from collections import defaultdict

import torch
from torch import Tensor, fx

from .lowering import implementation_on

aten = torch.ops.aten
MOST = 1 << 21  # numbers of a tensor from which a launch of its own costs little
LEAST = 3  # casts


def cast_together(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Contiguous tensors of one dtype, each in ``dtype``."""
    results = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if implementation_on(tensors[0].device.type) == "triton":
        from .kernels.casts import cast_all

        if cast_all(tensors, results):
            return results
    torch._foreach_copy_(results, tensors)
    return results


def _compile_ahead(on: torch.device, tensors: list[Tensor], dtype: torch.dtype) -> None:
    from .kernels.casts import compile_ahead

    compile_ahead(on, tensors, dtype)


cast_together.compile_ahead = _compile_ahead  # type: ignore[attr-defined]


def gather_casts(graph: fx.Graph) -> int:
    """In place, on a graph that nothing will trace again; returns how many casts were gathered.

    Those of the graph's inputs are done where the first of them stood; those of results that are only returned, where the last stood.
    """
    groups: dict[tuple, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if _is_small_cast(node):
            source: fx.Node = node.args[0]
            of_input = source.op == "placeholder"
            if of_input or all(user.op == "output" for user in node.users):
                value, cast = source.meta["val"], node.meta["val"]
                groups[(of_input, value.dtype, cast.dtype, value.device)].append(node)
    gathered = [(of_input, casts) for (of_input, *_), casts in groups.items() if len(casts) >= LEAST]
    for of_input, casts in gathered:
        _gather(graph, casts, casts[0] if of_input else casts[-1])
    return sum(len(casts) for _, casts in gathered)


def _gather(graph: fx.Graph, casts: list[fx.Node], before: fx.Node) -> None:
    sources = list(dict.fromkeys(cast.args[0] for cast in casts))
    with graph.inserting_before(before):
        together = graph.call_function(cast_together, (sources, casts[0].meta["val"].dtype))
        together.meta = {key: fact for key, fact in before.meta.items() if key != "val"}
        results = {source: graph.call_function(operator.getitem, (together, i)) for i, source in enumerate(sources)}
    for cast in casts:
        result = results[cast.args[0]]
        result.meta = dict(cast.meta)
        cast.replace_all_uses_with(result)
        graph.erase_node(cast)


def _is_small_cast(node: fx.Node) -> bool:
    """Is this nothing but another dtype for a contiguous tensor of known, small size."""
    if node.op != "call_function" or node.target is not aten._to_copy.default or not node.users:
        return False
    source, kwargs = node.args[0], {**node.kwargs}
    value, cast = getattr(source, "meta", {}).get("val"), node.meta.get("val")
    if not isinstance(value, Tensor) or not isinstance(cast, Tensor) or kwargs.pop("dtype", None) is None:
        return False
    sized = all(isinstance(size, int) for size in value.shape) and value.numel() <= MOST
    return (sized and value.device == cast.device and value.is_contiguous() and cast.is_contiguous() and value.dtype != cast.dtype
            and kwargs.pop("device", value.device) == value.device and kwargs.pop("layout", torch.strided) == torch.strided
            and not any(kwargs.values()))  # fmt: skip
