"""bitsandbytes' function of a linear with a 4-bit weight, traced as its forward alone.

Dynamo traces both bodies of a ``torch.autograd.Function``, seven times in a block, a tenth of a first step; and what is made of them
(canonical/quantized.py) is the linear of the dequantized weight, whose derivative is that backward:

    y = x W^T + b,   W = dequantize(packed)          dx = dy W,   db = sum over rows of dy

So where the class is bitsandbytes' own, and its backward has no other words than that one, the forward is traced in place, as Dynamo
does where no gradient is asked. Such a graph has no derivative until its products are rewritten: where one is left (a rule that is
excluded, a weight that is not read), the whole graph is traced again, both bodies of everything (``trace_again``).
"""

from __future__ import annotations

import sys
from types import FunctionType
from typing import Any

from torch import fx, is_grad_enabled, nn

from fxfuse._torch import (
    AutogradFunctionContextVariable,
    AutogradFunctionVariable,
    CompileContext,
    TensorifyScalarRestartAnalysis,
    VariableTracker,
    sources,
)

_MODULE, _NAME = "bitsandbytes.autograd._functions", "MatMul4Bit"
# All that a backward of a frozen 4-bit weight says.
_WORDS = frozenset([
    "is_empty", "bias", "torch", "zeros_like", "A", "B", "needs_input_grad", "tensors", "sum", "dtype_bias", "matmul", "F",
    "dequantize_4bit", "state", "to", "dtype",
])  # fmt: skip
_PRODUCTS = ("bitsandbytes::gemm_4bit", "bitsandbytes::gemv_4bit", "bitsandbytes::dequantize_4bit",
             "bitsandbytes::dequantize_blockwise")

_of_dynamo = AutogradFunctionVariable.call_apply
_short: dict[Any, Any] = {}  # compilations that traced a forward alone, and what Dynamo noted down for beginning anew
_in_full: set[Any] = set()  # compilations that must not


def call_apply(self: Any, tx: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Dynamo's, but for the known function."""
    compilation = CompileContext.current_compile_id()
    if compilation is None or compilation in _in_full or kwargs or not is_grad_enabled() or not _is_known(self.fn_cls) \
            or not _writes_nowhere(args) or not _looks_again(tx.output.compiler_fn):
        return _of_dynamo(self, tx, args, kwargs)
    _short[compilation] = tx.speculation_log
    source = sources.AttrSource(self.source, "forward") if self.source else None
    context = AutogradFunctionContextVariable.create(tx, args, kwargs)
    forward = VariableTracker.build(tx, self.fn_cls.forward, source=source, realize=True)
    return forward.call_function(tx, [context, *args], {})


def _looks_again(backend: Any) -> bool:
    """Is this compiled by one of our backends, which calls ``trace_again`` before anything runs."""
    while hasattr(backend, "compiler_fn"):  # torch's wrappers
        backend = backend.compiler_fn
    return getattr(backend, "looks_again", False)


def _is_known(function: type) -> bool:
    if function.__name__ != _NAME or function.__module__ != _MODULE or function is not getattr(sys.modules[_MODULE], _NAME, None):
        return False
    bodies = (function.forward, function.backward)  # type: ignore[attr-defined]
    ours = all(isinstance(body, FunctionType) and body.__module__ == _MODULE for body in bodies)
    return ours and _WORDS >= set(bodies[1].__code__.co_names) >= {"matmul", "dequantize_4bit"}


def _writes_nowhere(args: list[Any]) -> bool:
    """Is the place for the result, the third argument, none."""
    return len(args) == 5 and args[2].is_python_constant() and args[2].as_python_constant() is None


def trace_again(gm: fx.GraphModule) -> None:
    """Dynamo begins anew where this graph, the one that will run, was traced the short way and has a product left."""
    compilation = CompileContext.current_compile_id()
    _in_full.discard(compilation)  # (this trace was; the numbers of compilations are given again after a reset)
    notes = _short.pop(compilation, None)
    if notes is not None and any(map(_has_product, gm.modules())):
        _in_full.add(compilation)
        notes.clear()  # (another trace may have other places for a graph break)
        raise TensorifyScalarRestartAnalysis


def _has_product(part: nn.Module) -> bool:
    """Is this a graph, or the body of an operation in one, with a product of bitsandbytes'."""
    if not isinstance(part, fx.GraphModule):
        return False
    schemas = (getattr(node.target, "_schema", None) for node in part.graph.nodes if node.op == "call_function")
    return any(schema is not None and schema.name in _PRODUCTS for schema in schemas)


SETTINGS: tuple[tuple[Any, str, Any], ...] = ((AutogradFunctionVariable, "call_apply", call_apply),)
