"""Saved tensors that the plan keeps on the host: offload nodes in a forward graph, reload nodes in its backward graph.

Runs over the two graphs after the partition. A node of the joint graph with ``meta["offload"] = True`` (an input of the block as
well as anything that is computed and tagged MUST_SAVE) is sent out as soon as it is there, and brought back before its first use in the
backward. When the copies run, and what holds which memory, is decided while the model runs: see offload_runtime.py.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, fx

from .._torch import FakeTensor
from .joint import base_of, is_view
from .offload_op import offload, on, reload

TAG = "offload"  # node.meta key, in the joint graph
_HOST = torch.device("cpu")


def offload_saved(forward: fx.GraphModule, backward: fx.GraphModule, num_fwd_outputs: int) -> int:
    """Send tagged saved tensors to the host and bring them back, in place; returns how many."""
    inputs = {node.name: node for node in backward.graph.find_nodes(op="placeholder")}
    results = list(forward.graph.output_node().args[0])
    chosen = [node for node in dict.fromkeys(results[num_fwd_outputs:])
              if isinstance(node, fx.Node) and node.name in inputs and inputs[node.name].users and _may_leave(node)]
    if not chosen:
        return 0
    order = {node: i for i, node in enumerate(backward.graph.nodes)}
    first_use = {node: min(inputs[node.name].users, key=order.__getitem__) for node in chosen}
    chosen.sort(key=lambda node: order[first_use[node]])
    for rank, node in enumerate(chosen):
        shared = _is_shared(node, results[:num_fwd_outputs])
        sent = _send(node, rank, len(chosen), shared)
        results[num_fwd_outputs:] = [sent if result is node else result for result in results[num_fwd_outputs:]]
        _bring_back(inputs[node.name], first_use[node])
    forward.graph.output_node().args = (tuple(results),)
    for gm in (forward, backward):
        gm.graph.lint()
        gm.recompile()
    return len(chosen)


def _may_leave(node: fx.Node) -> bool:
    """Is this tensor, or what it is a view of, tagged; and is it a plain tensor that the graph itself does not write to."""
    value = node.meta.get("val")
    if not (node.meta.get(TAG) or base_of(node).meta.get(TAG)) or not isinstance(value, Tensor) or value.layout != torch.strided:
        return False
    return not any(_writes(user) and user.args[0] is alias for alias in _aliases(node) for user in alias.users)


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _aliases(node: fx.Node) -> list[fx.Node]:
    """What it is a view of, and all views of that."""
    found = [base_of(node)]
    for alias in found:
        found += [user for user in alias.users if is_view(user) and user.args[0] is alias]
    return found


def _is_shared(node: fx.Node, returned: list) -> bool:
    """Do others than the graph hold this memory: it came as an input, or is returned."""
    base = base_of(node)
    return base.op == "placeholder" or any(isinstance(result, fx.Node) and base_of(result) is base for result in returned)


def _send(node: fx.Node, rank: int, count: int, shared: bool) -> fx.Node:
    """The node's place on the host, right after the node (after all inputs, if it is one)."""
    graph = node.graph
    after = node
    while after.op == "placeholder" and after.next.op == "placeholder":
        after = after.next
    with graph.inserting_after(after):
        sent = graph.call_function(offload, (node, rank, count, shared))
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
