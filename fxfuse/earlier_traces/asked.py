"""What is asked of AOTAutograd, as text: two graphs with the same text over the same inputs have the same trace.

Whatever has no exact text raises Unknown, and is traced: a tensor among the arguments, an operator of somebody else's library, a Python
function outside torch, a wrapper subclass, a size that depends on data.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from functools import lru_cache
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from .._torch import FakeTensor, OpOverload, ShapeEnv

# Of the facts on a Dynamo graph's nodes: what AOTAutograd does not read, or what is written below in other words.
_ELSEWHERE = frozenset(["example_value", "grapharg", "tensor_dict", "creation_timestamp", "nn_module_stack", "stack_trace",
                        "source_fn_stack", "seq_nr", "from_node"])
_NAMESPACES = ("aten", "prims", "prim", "fxfuse")
_MODULES = ("torch", "_operator", "operator", "builtins", "math")
_KINDS = (FunctionType, BuiltinFunctionType, MethodDescriptorType, type)  # what one name says all of: nothing bound, no object
_PLAIN = (int, float, complex, str, bytes, type(None), type(...), torch.dtype, torch.device, torch.layout, torch.memory_format, range)


class Unknown(Exception):
    """Something has no exact text, or cannot be written: it is traced, and not kept."""


def text_of_graph(gm: fx.GraphModule) -> str:
    """Every node with its operator, its arguments, its name, and the places in the model that it comes from."""
    if any(True for _ in (*gm.parameters(), *gm.buffers())):
        raise Unknown("a graph with tensors of its own")
    if type(gm.graph._codegen) is not fx.graph.CodeGen:
        raise Unknown(f"a graph with a {type(gm.graph._codegen).__name__}")
    lines = []
    for node in gm.graph.nodes:
        if node.op == "get_attr" and not node.users:
            continue  # what is left of a call that was replaced
        further = {key: value for key, value in node.meta.items() if key not in _ELSEWHERE}
        call = f"{node.op} {_target(node)} {text_of(node.args)} {text_of(node.kwargs)}"
        lines.append(f"{node.name} = {call} {text_of(further)} {_origin(node)}")
    return "\n".join(lines)


def text_of_inputs(inputs: Sequence[Any]) -> str:
    """Shapes, strides, dtypes, devices, gradients and shared memory of fake tensors; sizes as expressions."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    lines = []
    for value in inputs:
        if not isinstance(value, Tensor):
            lines.append(text_of(value))
            continue
        if id(value) in seen:
            raise Unknown("a tensor that is given twice")
        seen.add(id(value))
        storage = storages.setdefault(value.untyped_storage()._cdata, len(storages))
        lines.append(f"{text_of_tensor(value)} leaf {value.is_leaf} view {value._is_view()} storage {storage}")
    return "\n".join(lines)


def text_of_tensor(tensor: Tensor) -> str:
    """A fake tensor's facts; Unknown unless it is a plain strided one."""
    if type(tensor) not in (FakeTensor, torch.nn.Parameter) or not isinstance(tensor, FakeTensor):
        raise Unknown(f"a {type(tensor).__name__}")
    if tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg() or tensor.is_inference() or tensor.is_quantized:
        raise Unknown("a tensor that is not plainly strided")
    if tensor.constant is not None or tensor.is_nested:
        raise Unknown("a fake tensor with values")
    sizes = text_of((tuple(tensor.shape), tensor.stride(), tensor.storage_offset()))
    return f"{type(tensor).__name__} {sizes} {tensor.dtype} {tensor.device} {tensor.requires_grad}"


def text_of_sizes(env: ShapeEnv | None) -> str:
    """All that is known of symbolic sizes: their values now, ranges, equalities, guards. It must stay so while a trace is made."""
    if env is None:
        return ""
    facts = [
        [(str(guard.expr), guard.size_oblivious) for guard in env.guards],
        _sorted(env.backed_var_to_val), _sorted(env.var_to_range), _sorted(env.replacements), _sorted(env.var_to_hint_override),
        sorted(map(str, env.divisible)), sorted(map(str, env.size_like)), sorted(map(str, env.axioms)), sorted(env.unique_ids),
        env.unbacked_symint_counter, env.unbacked_symfloat_counter, env.num_deferred_runtime_asserts,
        str(env.settings), env.frozen, sorted(map(str, env.unbacked_inputs)), len(env.specializations),
    ]  # fmt: skip
    if env.unbacked_symint_counter or env.unbacked_symfloat_counter or env._translation_validation_enabled:
        raise Unknown("sizes that depend on data")
    return repr(facts)


def _sorted(facts: dict[Any, Any]) -> list[tuple[str, str]]:
    return sorted((str(name), str(fact)) for name, fact in facts.items())


def text_of(value: Any) -> str:
    """A value among a node's arguments or facts."""
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return f"{type(value).__name__}({_written(value.node.expr)} {value.node.hint})"
    if isinstance(value, enum.Enum):
        return f"{type(value).__module__}.{value}"
    if isinstance(value, _PLAIN):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__}[{', '.join(map(text_of, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{text_of(key)}: {text_of(item)}' for key, item in value.items())}}}"
    if isinstance(value, slice):
        return f"slice{text_of((value.start, value.stop, value.step))}"
    if isinstance(value, Tensor):
        return text_of_tensor(value)
    if isinstance(value, OpOverload):
        return text_of_op(value)
    raise Unknown(f"a {type(value).__name__}")


@lru_cache(maxsize=4096)
def _written(expr: sympy.Basic) -> str:
    """The whole of an expression, its symbols' assumptions too."""
    return sympy.srepr(expr)


def text_of_op(op: OpOverload) -> str:
    """An operator with its schema: of torch's own libraries, or of fxfuse, whose sources are part of what is asked."""
    if op.namespace not in _NAMESPACES:
        raise Unknown(f"the operator {op}, whose rules are not ours to know")
    return str(op._schema)


def _target(node: fx.Node) -> str:
    target = node.target
    if node.op != "call_function":
        if node.op not in ("placeholder", "call_method", "output"):
            raise Unknown(f"a {node.op}")
        return str(target)
    return text_of_op(target) if isinstance(target, OpOverload) else text_of_function(target)


def text_of_function(function: Any) -> str:
    """A function of torch or of Python, by the name under which it is found there."""
    module = getattr(function, "__module__", None) or ""
    if isinstance(function, (BuiltinFunctionType, MethodDescriptorType)) and not module:
        module = "torch"  # (methods of torch._C._VariableFunctions say no module)
    name = getattr(function, "__qualname__", "") or getattr(function, "__name__", "")
    if module.split(".")[0] not in _MODULES or not name or "<" in name or not isinstance(function, _KINDS):
        raise Unknown(f"the function {function}")
    code = getattr(function, "__code__", None)
    if code is not None and not code.co_filename.startswith(torch.__path__[0]):
        raise Unknown(f"the function {function}, which somebody replaced")
    return f"{module}.{name}"


def _origin(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    modules = [(path, getattr(kind, "__qualname__", str(kind))) for path, kind in stack.values()]
    return f"{modules} {node.meta.get('stack_trace')!r} {bool('source_fn_stack' in node.meta)}"
