"""Saved tensors that the plan keeps on the host: offload nodes in a forward graph, reload nodes in its backward graph.

Runs over the two graphs after the partition. A node of the joint graph with ``meta["offload"] = True`` (an input of the block as
well as anything that is computed and tagged MUST_SAVE) is sent out as soon as it is there, and brought back before its first use in the
backward. When the copies run, and what holds which memory, is decided while the model runs: see offload_runtime.py.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from .._torch import FakeTensor
from .joint import base_of, bytes_of, is_view
from .offload_op import offload, on, reload
from .sizes import Sizes

TAG = "offload"  # node.meta key, in the joint graph
_HOST = torch.device("cpu")
_GAPS = 1.25  # times the bytes of tensors that are copied with what lies between their elements


class Sent(NamedTuple):
    """What is copied, and the saved tensors that lie in it: itself, or views of it, in the order in which they are made."""

    whole: fx.Node
    parts: list[fx.Node]


def offload_saved(forward: fx.GraphModule, backward: fx.GraphModule, num_fwd_outputs: int) -> int:
    """Send tagged saved tensors to the host and bring them back, in place; returns how many."""
    inputs = {node.name: node for node in backward.graph.find_nodes(op="placeholder")}
    results: list[Any] = list(forward.graph.output_node().args[0])  # type: ignore[arg-type]
    chosen = [node for node in dict.fromkeys(results[num_fwd_outputs:])
              if isinstance(node, fx.Node) and node.name in inputs and inputs[node.name].users and _may_leave(node)]
    if not chosen:
        return 0
    order = {node: i for i, node in enumerate(backward.graph.nodes)}
    first_use = {node: min(inputs[node.name].users, key=order.__getitem__) for node in chosen}
    sendings = sorted(_together(chosen), key=lambda sent: min(order[first_use[node]] for node in sent.parts))
    for rank, (whole, parts) in enumerate(sendings):
        shared = _is_shared(whole, results[:num_fwd_outputs])
        for part, node in enumerate(parts):
            sent = _send(node, whole, rank, len(sendings), part, len(parts), shared)
            results[num_fwd_outputs:] = [sent if result is node else result for result in results[num_fwd_outputs:]]
            _bring_back(inputs[node.name], first_use[node])
    forward.graph.output_node().args = (tuple(results),)
    for gm in (forward, backward):
        gm.graph.lint()
        gm.recompile()
    return len(chosen)


def _together(chosen: Sequence[fx.Node]) -> list[Sent]:
    """Tensors in one memory go with that memory: it is copied once, and without gaps between their elements."""
    by_memory: dict[fx.Node, list[fx.Node]] = {}
    order = {node: i for i, node in enumerate(chosen[0].graph.nodes)}
    for node in sorted(chosen, key=order.__getitem__):
        by_memory.setdefault(_memory_of(node), []).append(node)
    sendings = []
    for whole, parts in by_memory.items():
        if (len(parts) > 1 or not _is_dense(parts[0])) and _is_worth_it(whole, parts):
            sendings.append(Sent(whole, parts))
        else:
            sendings += [Sent(node, [node]) for node in parts]
    return sendings


def _memory_of(node: fx.Node) -> fx.Node:
    """What made the memory in which a tensor lies; also seen through what gives several views (a split)."""
    while True:
        source = node.args[0] if node.args else None
        if is_view(node) and isinstance(source, fx.Node):
            node = source
        elif node.target is operator.getitem and isinstance(source, fx.Node) and is_view(source):
            node = source.args[0]  # type: ignore[assignment]
        else:
            return node


def _is_worth_it(whole: fx.Node, parts: Sequence[fx.Node]) -> bool:
    """Is the memory of views hardly more than what they show of it, so that it may go in their place."""
    value, shown = whole.meta.get("val"), [node.meta["val"] for node in parts]
    if not isinstance(value, Tensor) or value.is_complex() or any(v.dtype != value.dtype for v in shown):
        return False
    return _is_dense(whole) and bytes_of(whole) <= _GAPS * sum(map(bytes_of, parts))


def _is_dense(node: fx.Node) -> bool:
    """Are there, as far as the sizes of the trace tell, few elements of others between this tensor's."""
    value = node.meta["val"]
    number = Sizes().number
    span = 1 + sum((number(size) - 1) * number(stride) for size, stride in zip(value.shape, value.stride(), strict=True))
    return span * value.element_size() <= _GAPS * bytes_of(node)


def _may_leave(node: fx.Node) -> bool:
    """Is this tensor, or what it is a view of, tagged; and is it a plain tensor that the graph itself does not write to."""
    value = node.meta.get("val")
    tagged = any(alias.meta.get(TAG) for alias in (node, base_of(node), _memory_of(node)))
    if not tagged or not isinstance(value, Tensor) or value.layout != torch.strided:
        return False
    return not any(_writes(user) and user.args[0] is alias for alias in _aliases(node) for user in alias.users)


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _aliases(node: fx.Node) -> list[fx.Node]:
    """What made the memory in which it lies, and all views of that."""
    found = [_memory_of(node)]
    for alias in found:
        found += [user for user in alias.users if _memory_of(user) is found[0]]
    return found


def _is_shared(node: fx.Node, returned: list) -> bool:
    """Do others than the graph hold this memory: it came as an input, or is returned."""
    memory = _memory_of(node)
    return memory.op == "placeholder" or any(isinstance(result, fx.Node) and _memory_of(result) is memory for result in returned)


def _send(node: fx.Node, whole: fx.Node, rank: int, count: int, part: int, parts: int, shared: bool) -> fx.Node:
    """The node's place on the host, right after the node (after all inputs, if it is one)."""
    graph = node.graph
    after = node
    while after.op == "placeholder" and after.next.op == "placeholder":
        after = after.next
    with graph.inserting_after(after):
        sent = graph.call_function(offload, (node, whole, rank, count, part, parts, shared))
    sent.meta = {"val": _like(node.meta["val"], _HOST)}
    return sent


def _bring_back(kept: fx.Node, before: fx.Node) -> None:
    """The backward's input is on the host; everything that read it reads what comes back."""
    value = kept.meta["val"]
    with kept.graph.inserting_before(before):
        back = kept.graph.call_function(reload, (kept, value.device))
    kept.replace_all_uses_with(back, delete_user_cb=lambda user: user is not back)
    back.meta = {"val": value}
    # The forward's node may share this dictionary.
    kept.meta = {key: fact for key, fact in kept.meta.items() if key != "tensor_meta"} | {"val": _like(value, _HOST)}


def _like(value: Tensor, device: torch.device) -> Tensor:
    """A tensor of the trace with the same sizes and strides, on a device."""
    with value.fake_mode if isinstance(value, FakeTensor) else nullcontext():
        return on(device, value)
