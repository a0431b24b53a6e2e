"""Facts about a node, read from ``node.meta``: dtype, shape, gradient, which module and which line it comes from.

Dynamo leaves them under ``example_value``, torch.export under ``val``. Sizes may be symbolic; two sizes are the same only when
that is statically known, so that asking never adds a guard.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .._torch import FakeTensor

_OF_THE_VALUE = ("example_value", "val", "tensor_meta", "unbacked_bindings", "from_node", "original_aten")


def value_of(node: Node) -> Any:
    """What the node stands for at trace time: a (fake) tensor, a symbolic number, a tuple of these, or None when unknown."""
    if "example_value" in node.meta:
        return node.meta["example_value"]
    if "val" in node.meta:
        return node.meta["val"]
    return _attribute(node) if node.op == "get_attr" else None


def tensor_of(node: Any) -> Tensor | None:
    """The (fake) tensor that the node stands for, or None if it is no tensor or nothing is known."""
    value = value_of(node) if isinstance(node, Node) else None
    return value if isinstance(value, Tensor) else None


def dtype_of(node: Any) -> torch.dtype | None:
    tensor = tensor_of(node)
    return None if tensor is None else tensor.dtype


def shape_of(node: Any) -> torch.Size | None:
    tensor = tensor_of(node)
    return None if tensor is None else tensor.shape


def same_size(a: Any, b: Any) -> bool:
    """Are two sizes equal, for every input that the graph accepts."""
    return statically_known_true(a == b)


def statically_one(size: Any) -> bool:
    """Is a size 1 (Dynamo and export give a size of 1 its own graph, so this is always known)."""
    return same_size(size, 1)


def same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


def same_shape(a: Any, b: Any) -> bool:
    """Do two nodes have the same known shape."""
    shape_a, shape_b = shape_of(a), shape_of(b)
    return shape_a is not None and shape_b is not None and same_sizes(shape_a, shape_b)


def same_strides(a: Tensor, b: Tensor) -> bool:
    """Do two tensors of one shape lie alike in memory (the stride of a dimension of size 1 says nothing)."""
    return all(
        same_size(size, 1) or same_size(x, y) for size, x, y in zip(a.shape, a.stride(), b.stride(), strict=True)
    )


def requires_grad(node: Any) -> bool:
    """Can a gradient be asked of the node. Export and fake propagation detach what they record: there, of every real value."""
    tensor = tensor_of(node)
    if tensor is None:
        return False
    recorded_detached = "val" in node.meta and "example_value" not in node.meta
    return tensor.requires_grad or (recorded_detached and tensor.is_floating_point())


def provenance(node: Node) -> dict[str, Any]:
    """What a node's meta says of where it comes from, and not of its value."""
    return {key: fact for key, fact in node.meta.items() if key not in _OF_THE_VALUE}


def record(node: Node, value: Any, like: Node) -> None:
    """Keep what a node stands for under the name that ``like`` keeps its own."""
    detached = "val" in like.meta and "example_value" not in like.meta
    node.meta["val" if detached else "example_value"] = value


_SELF = re.compile(r"^L\['self'\]\.?")
_INDEX = re.compile(r"\[['\"]?([^\]'\"]+)['\"]?\]")
_CONTAINER = re.compile(r"\._(?:modules|parameters|buffers)\b")


def module_path(node: Node) -> str:
    """The dotted path of the innermost module that the node comes from, relative to the captured module ("" for itself)."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = next(reversed(stack.values()))[0]
    return _INDEX.sub(r".\1", _CONTAINER.sub("", _SELF.sub("", path))).lstrip(".")


def user_line(node: Node) -> str:
    """Where the user wrote it: ``file.py:12: y = x * w``, or "" when the trace kept no line."""
    frames = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    for place, code in zip(reversed(frames[:-1]), reversed(frames[1:]), strict=True):
        if found := re.match(r'File "(.+)", line (\d+)', place):
            return f"{found[1].rsplit('/', 1)[-1]}:{found[2]}: {code}"
    return ""


def _attribute(node: Node) -> Any:
    """The value of a ``get_attr`` node, found from the module that owns its graph."""
    value: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        value = getattr(value, name, None)
    return value


def static_size(size: Any) -> int | None:
    """A size as a number, or None when it is symbolic."""
    return size if isinstance(size, int) else size.node.maybe_as_int()


def is_plain(tensor: Tensor) -> bool:
    """An ordinary (fake) tensor or parameter; a subclass such as DTensor or a quantized weight is not."""
    return isinstance(tensor, FakeTensor) or type(tensor) in (Tensor, torch.nn.Parameter, torch.nn.Buffer)


def known_tensor(node: Any) -> Tensor:
    """The (fake) tensor of a node that is known to be one."""
    tensor = tensor_of(node)
    if tensor is None:
        raise TypeError(f"{node} stands for no tensor")
    return tensor


def known_shape(node: Any) -> torch.Size:
    return known_tensor(node).shape


def known_dtype(node: Any) -> torch.dtype:
    return known_tensor(node).dtype


def tensor_inputs(node: Node) -> list[Node]:
    """The operands that are tensors (symbolic sizes are operands too)."""
    return [operand for operand in node.all_input_nodes if tensor_of(operand) is not None]
