"""Linears with bitsandbytes' 4-bit weights, read as a dequantization and a linear.

Dynamo leaves them in two forms. Where the input needs a gradient, an ``autograd_function_apply`` with both bodies

    gemm_4bit(x, packed, (N, K), absmax, blocksize, quant_type, bias, absmax_8bit, absmax_code, absmax_offset)
    grad_x = matmul(grad, dequantize_4bit(packed, ...).to(grad.dtype))

and where it does not, the bare ``gemm_4bit``. Both become

    linear(x, fxfuse::dequantize_4bit(packed, absmax, ..., x.dtype), bias)

whose derivative is that backward. A graph that no gradient is asked of keeps bitsandbytes' operation, whose kernels for few rows
win there.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from ..quantized_op import dequantize_4bit
from .builder import Builder, Leave, stands_for
from .facts import module_path, tensor_of, value_of

_APPLY = "autograd_function_apply"
_GEMM = "bitsandbytes::gemm_4bit"
_OPERATIONS = frozenset([_GEMM, "bitsandbytes::gemv_4bit", "bitsandbytes::dequantize_4bit"])
# What the bodies hold besides the product: bookkeeping, and in the backward the same weight, dequantized step by step.
_BOOKKEEPING = frozenset([torch._C._set_grad_enabled, operator.eq, operator.getitem, torch.Size, "numel", "view", "to"])
_BACKWARD = frozenset(["bitsandbytes::dequantize_blockwise", "bitsandbytes::dequantize_4bit", operator.iadd, torch.matmul, "sum"])
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_EIGHT_BITS = {torch.int8: "an 8-bit integer (LLM.int8)", torch.float8_e4m3fn: "a float8 (e4m3)", torch.float8_e5m2: "a float8 (e5m2)"}


@dataclass(frozen=True)
class QuantizedLinear:
    """A linear with a quantized weight that was found. ``reason``: why it stays as it was, or nothing."""

    module: str
    device: str
    reason: str = ""


@dataclass(frozen=True)
class _Product:
    """A ``gemm_4bit``: ``node`` has its value, ``arguments`` are those of its schema, as nodes of the graph or constants."""

    node: Node
    arguments: dict[str, Any]


# For device, blocksize, code, shape, dtype and nesting of a weight: why it is not to be dequantized by us, or nothing.
Check = Callable[[torch.device, int, str, tuple[int, int], torch.dtype, bool], str]


def read_quantized_linears(gm: GraphModule, why_not: str = "", check: Check | None = None) -> list[QuantizedLinear]:
    """Rewrite the 4-bit linears of a graph in place, or none where ``why_not`` says why; returns what there is."""
    found = list(_eight_bit_linears(gm))
    builder = Builder(gm)
    for node in list(gm.graph.nodes):
        operations = _quantized_operations(gm, node)
        if operations and _GEMM not in operations:
            reason = f"it is written with {' and '.join(sorted(operations))}, which is not read"
            found.append(QuantizedLinear(module_path(node), _device_of(node), why_not or reason))
        if _GEMM not in operations:
            continue
        device = _device_of(node)
        if why_not or not torch.is_grad_enabled():
            reason = why_not or "no gradient is asked of this graph: bitsandbytes' own kernels run it"
            found.append(QuantizedLinear(module_path(node), device, reason))
            continue
        try:
            dequantization = _replace(gm, builder, _read(gm, node), check)
        except Leave as leave:
            builder.discard()
            found.append(QuantizedLinear(module_path(node), device, str(leave)))
        else:
            found.append(QuantizedLinear(module_path(dequantization), device))
    return found


def _quantized_operations(gm: GraphModule, node: Node) -> set[str]:
    """The names of the operations on 4-bit weights that a node is, or that the forward of an applied function has."""
    body = _body(gm, node, 0) if _name(node) == _APPLY else None
    names = [_name(node)] if body is None else [_name(inner) for inner in body.graph.nodes]
    return {name for name in names if name in _OPERATIONS}


def _name(node: Node) -> Any:
    """What a call is, comparably: the name of an op or of a method, or the function itself."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return None
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return schema.name
    return _APPLY if getattr(node.target, "__name__", "") == _APPLY else node.target


def _body(gm: GraphModule, apply: Node, which: int) -> GraphModule | None:
    body = apply.args[which]
    found = getattr(gm, str(body.target), None) if isinstance(body, Node) and body.op == "get_attr" else None
    return found if isinstance(found, GraphModule) else None


def _read(gm: GraphModule, node: Node) -> _Product:
    """The product that a node stands for. Leave says why it is not one."""
    if _name(node) == _GEMM:
        return _Product(node, _by_name(node, {}))
    forward, backward = _body(gm, node, 0), _body(gm, node, 1)
    if forward is None or backward is None:
        raise Leave("its forward and backward are not both in the graph")
    inner = _only_product(forward)
    for other in (n for n in backward.graph.nodes if n.op not in ("placeholder", "output", "get_attr")):
        if _name(other) not in _BOOKKEEPING | _BACKWARD:
            raise Leave(f"its backward is not that of a frozen 4-bit weight: it has {other.target}")
    # In some versions of torch the bodies take a context first.
    places = forward.graph.find_nodes(op="placeholder")
    outer = dict(zip(reversed(places), reversed(node.args[2:]), strict=False))
    return _Product(_value_of_apply(node), _by_name(inner, outer))


def _only_product(forward: GraphModule) -> Node:
    """The one product of a body, which is its first output."""
    products = [n for n in forward.graph.nodes if _name(n) == _GEMM]
    calls = [n for n in forward.graph.nodes if n.op in ("call_function", "call_method") and n not in products]
    if len(products) != 1 or any(_name(n) not in _BOOKKEEPING for n in calls):
        raise Leave("its forward does more than one product with a 4-bit weight")
    first = forward.graph.output_node().args[0]
    while isinstance(first, (tuple, list)) and first:
        first = first[0]
    if first is not products[0]:
        raise Leave("its forward does not return the product itself")
    return products[0]


def _value_of_apply(node: Node) -> Node:
    """The node that has the one value of an applied function."""
    if not isinstance(value_of(node), (tuple, list)):
        return node
    if len(node.users) != 1 or (user := next(iter(node.users))).target is not operator.getitem or user.args[1] != 0:
        raise Leave("its function gives several values")  # torch 2.11 adds what the body computes: values that nothing reads
    return user


def _by_name(node: Node, outer: dict[Node, Any]) -> dict[str, Any]:
    """The arguments of a product by their names, seen from the graph that ``outer`` leads to."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    arguments: dict[str, Any] = dict.fromkeys(names) | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return {name: _seen_from_outside(value, outer) for name, value in arguments.items()}


def _seen_from_outside(value: Any, outer: dict[Node, Any]) -> Any:
    while isinstance(value, Node):
        if value in outer:
            value = outer[value]
        elif value.target == "view" and value.args[1:] == (-1, 1):
            value = value.args[0]  # bitsandbytes' way to name a packed weight: one column
        else:
            break
    return value


def _replace(gm: GraphModule, b: Builder, product: _Product, check: Check | None) -> Node:
    """Put the dequantization and the linear in the place of a product; returns the dequantization."""
    arguments, node = product.arguments, product.node
    b.at(node)
    x = tensor_of(arguments["A"])
    packed = tensor_of(arguments["B"])
    if x is None or packed is None or x.dtype not in _FLOATS:
        raise Leave("its operands are not tensors of a dtype that it multiplies in")
    if any(n.requires_grad for n in map(tensor_of, (arguments["B"], arguments["absmax"])) if n is not None):
        raise Leave("a gradient is asked of its packed weight")
    autocast = _autocast_dtype(node, x.device.type)
    if autocast not in (None, x.dtype):
        raise Leave(f"autocast would multiply in {autocast}, the layer computes in {x.dtype}")
    tensors = [arguments[name] for name in ("B", "absmax", "absmax_8bit", "absmax_code", "absmax_offset")]
    rows, columns = (_number(size) for size in _sizes(arguments["shapeB"]))
    blocksize, quant_type = _number(arguments["blocksize"]), arguments["quant_type"]
    reason = check(x.device, blocksize, quant_type, (rows, columns), x.dtype, tensors[2] is not None) if check else ""
    if reason:
        raise Leave(reason)
    weight = b.call(dequantize_4bit, *tensors, blocksize, quant_type, [rows, columns], x.dtype)
    linear = b.like("call_function", F.linear, (arguments["A"], weight, arguments["bias"]), {})
    if not stands_for(linear, node):
        raise Leave("its result is not what a linear gives")
    node.replace_all_uses_with(linear)
    _erase(gm, node)
    return weight


def _sizes(shape: Any) -> list[Any]:
    sizes = value_of(shape) if isinstance(shape, Node) else shape
    if not isinstance(sizes, (tuple, list)) or len(sizes) != 2:
        raise Leave("the shape of its weight is not known")
    return list(sizes)


def _number(size: Any) -> int:
    """A size that belongs to the model, as a number (with the guard that this takes where it was symbolic)."""
    value = value_of(size) if isinstance(size, Node) else size
    if not isinstance(value, (int, torch.SymInt)):
        raise Leave("a size of its weight is not known")
    return int(value)


def _autocast_dtype(node: Node, device: str) -> torch.dtype | None:
    """The dtype that autocast would run a linear in at this node, None where it is off."""
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    outside: list[torch.dtype | None] = []
    for earlier in node.graph.nodes:
        if earlier is node:
            break
        if earlier.target is torch.amp.autocast_mode._enter_autocast and earlier.args[0] == device:
            outside.append(dtype)
            dtype = (earlier.args[1] or torch.get_autocast_dtype(device)) if earlier.args[2] else None
        elif earlier.target is torch.amp.autocast_mode._exit_autocast and earlier.args[0].args[0] == device:
            dtype = outside.pop()
    return dtype


def _erase(gm: GraphModule, node: Node) -> None:
    """Erase a product that nothing reads any more, with the function it was a result of and the bodies of that."""
    applied = node.args[0] if node.target is operator.getitem else node
    gm.graph.erase_node(node)
    if applied is not node:
        gm.graph.erase_node(applied)
    for body in applied.args[:2]:
        if isinstance(body, Node) and body.op == "get_attr" and not body.users:
            gm.graph.erase_node(body)
            if not gm.graph.find_nodes(op="get_attr") or all(n.target != body.target for n in gm.graph.find_nodes(op="get_attr")):
                gm.delete_submodule(str(body.target))


def _eight_bit_linears(gm: GraphModule) -> Iterator[QuantizedLinear]:
    """Weights of eight bits, which stay as they are: one for each module."""
    told: set[str] = set()
    for node in gm.graph.nodes:
        tensor = tensor_of(node) if node.op in ("placeholder", "get_attr") else None
        if tensor is None or tensor.dim() != 2 or tensor.dtype not in _EIGHT_BITS or not node.users:
            continue
        module = module_path(next(iter(node.users)))
        if module not in told:
            told.add(module)
            yield QuantizedLinear(module, tensor.device.type, f"its weight is {_EIGHT_BITS[tensor.dtype]}; only the 4-bit weights "
                                  "of bitsandbytes are dequantized here, so it runs as it was")  # fmt: skip


def _device_of(node: Node) -> str:
    value = value_of(node)
    tensor = value[0] if isinstance(value, (tuple, list)) else value
    return tensor.device.type if isinstance(tensor, torch.Tensor) else "cpu"
