"""Graphs of other tracers made readable: leaf modules of torch.nn inlined, fake results computed.

Dynamo's graphs need neither. ``symbolic_trace`` leaves ``nn.LayerNorm`` and its kin as calls of modules, and knows no shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from .._torch import FakeTensor, FakeTensorMode
from .facts import value_of

_INLINED = (
    nn.LayerNorm, nn.RMSNorm, nn.SiLU, nn.GELU, nn.ReLU, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softmax, nn.LogSoftmax, nn.Dropout,
    nn.Identity, nn.CrossEntropyLoss, nn.Flatten,
)  # fmt: skip


def prepare(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """Inline the leaf modules that have a spelling, and give every node its fake result, in place."""
    inline_modules(gm)
    if any(value_of(node) is None for node in gm.graph.find_nodes(op="placeholder")):
        propagate(gm, example_inputs)
    return gm


def inline_modules(gm: fx.GraphModule) -> None:
    for node in gm.graph.find_nodes(op="call_module"):
        module = gm.get_submodule(str(node.target))
        if type(module) in _INLINED and not node.kwargs and not _has_hooks(module):
            _inline(gm, node, module)


def _inline(gm: fx.GraphModule, node: fx.Node, module: nn.Module) -> None:
    body = fx.Tracer().trace(module)
    for attribute in body.find_nodes(op="get_attr"):
        attribute.target = f"{node.target}.{attribute.target}"
    operands = dict(zip(body.find_nodes(op="placeholder"), node.args, strict=True))
    before = set(gm.graph.nodes)
    with gm.graph.inserting_before(node):
        result = gm.graph.graph_copy(body, operands)
    for inlined in set(gm.graph.nodes) - before:
        inlined.meta = {**node.meta, **inlined.meta}
    node.replace_all_uses_with(result)  # type: ignore[arg-type]
    gm.graph.erase_node(node)


def _has_hooks(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def propagate(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    """Run the graph on fake tensors; each node keeps its result, gradient requirement included, in ``example_value``."""
    fakes = [value for value in example_inputs if isinstance(value, FakeTensor)]
    mode = fakes[0].fake_mode if fakes else FakeTensorMode(allow_non_fake_inputs=True)
    inputs = [_fake(mode, value) for value in example_inputs]
    with mode:
        _Facts(gm).run(*inputs)


def _fake(mode: FakeTensorMode, value: Any) -> Any:
    if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
        return mode.from_tensor(value, static_shapes=True)
    return value


class _Facts(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "get_attr" and isinstance(value, torch.Tensor):
            return value
        n.meta["example_value"] = value
        return value
