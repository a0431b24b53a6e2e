"""Leaf modules of a symbolic trace are opened: ``torch.fx.symbolic_trace`` leaves an ``nn.LayerNorm`` as a call of a module,
and a call shows nothing to fuse.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from .canonical.vocabulary import reader_of


class _Open(fx.Tracer):
    """Traces into every module."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return False


def open_leaf_modules(gm: fx.GraphModule) -> None:
    """Replace, in place, calls of torch.nn's own modules that are fusible (norms, activations) by the functions they call."""
    for node in list(gm.graph.nodes):
        if node.op == "call_module":
            module = gm.get_submodule(str(node.target))
            if type(module).__module__.startswith("torch.nn.") and not module._forward_hooks and not module._forward_pre_hooks:
                _open(gm, node, module)
    gm.graph.lint()
    gm.recompile()


def _open(gm: fx.GraphModule, node: fx.Node, module: nn.Module) -> None:
    try:
        inner = _Open().trace(module)
    except (fx.proxy.TraceError, TypeError, NotImplementedError):
        return  # decides by values: stays a call
    inputs = [n for n in inner.nodes if n.op == "placeholder"]
    calls = [n for n in inner.nodes if n.op.startswith("call_")]
    if len(inputs) != len(node.args) or node.kwargs or any(reader_of(call) is None for call in calls):
        return
    copies: dict[fx.Node, Any] = dict(zip(inputs, node.args, strict=True))
    with gm.graph.inserting_before(node):
        for part in inner.nodes:
            if part.op == "output":
                node.replace_all_uses_with(copies[part.args[0]])  # type: ignore[index]
            elif part.op != "placeholder":
                copies[part] = gm.graph.node_copy(part, copies.__getitem__)
                copies[part].meta = {**node.meta, **part.meta}
                if part.op == "get_attr":
                    copies[part].target = f"{node.target}.{part.target}"
    gm.graph.erase_node(node)
