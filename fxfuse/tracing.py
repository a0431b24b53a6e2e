"""Tracing plain functions: run once on proxies that know their shape and dtype, in milliseconds.

Sizes, dtypes and Python constants (closures, keyword arguments) are fixed as the function computes with them; control flow on
them is allowed, on the values of tensors it is not. Each node carries its fake result in ``meta["example_value"]``, as in a graph
of Dynamo's.
"""

from __future__ import annotations

import inspect
import linecache
import operator
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.proxy import GraphAppendingTracer, TraceError
from torch.utils._pytree import tree_leaves, tree_map_only

from ._torch import DataDependentOutputException, DynamicOutputShapeException, FakeTensor, FakeTensorMode
from .errors import UnsupportedGraph

_FACTS = frozenset(["shape", "dtype", "device", "ndim", "requires_grad", "layout", "is_cuda", "itemsize", "nbytes", "is_sparse"])
_VIEWS = frozenset(["T", "mT", "H", "mH", "real", "imag"])
_OUTSIDE = (torch.__path__[0], __file__)
_FUNCTION_APPLY = torch.autograd.Function.apply.__func__.__code__


def trace_function(function: Callable[..., Any], *example_inputs: Any, **constants: Any) -> fx.GraphModule:
    """The graph of ``function(*example_inputs, **constants)``: tensors among the inputs are its placeholders, in order.

    Raises UnsupportedGraph where the function looks at the values of a tensor.
    """
    tracer = _Tracer(_fake_mode(example_inputs))
    names = iter(_names(function, example_inputs))
    inputs = tree_map_only(Tensor, lambda tensor: tracer.placeholder(next(names), tensor), example_inputs)
    try:
        result = function(*inputs, **constants)
    except TraceError as error:
        raise UnsupportedGraph(f"{_name_of(function)} cannot be traced: {error}; {_REMEDY}") from error
    tracer.graph.output(tracer.create_arg(result))
    gm = fx.GraphModule(tracer.root, tracer.graph, _name_of(function))
    gm.graph.lint()
    return gm


_REMEDY = "a fused function may depend on shapes, dtypes and constants, not on the values of tensors"


def _name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _names(function: Callable[..., Any], inputs: tuple[Any, ...]) -> list[str]:
    """A name for each tensor among the inputs: that of the parameter it is bound to."""
    try:
        bound = inspect.signature(function).bind_partial(*inputs).arguments
    except ValueError:  # a builtin, which has no signature
        bound = {"inputs": inputs} if len(inputs) > 1 else {"input": inputs[0]}
    names: list[str] = []
    for name, value in bound.items():
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        names += [name] if isinstance(value, Tensor) else [f"{name}_{i}" for i in range(len(tensors))]
    return names


def _fake_mode(inputs: tuple[Any, ...]) -> FakeTensorMode:
    fakes = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, FakeTensor)]
    return fakes[0].fake_mode if fakes else FakeTensorMode()


class TracedTensor(fx.Proxy):
    """Stands for a tensor while a function is traced."""

    def __init__(self, node: fx.Node, tracer: _Tracer) -> None:
        super().__init__(node, tracer)

    def __getattr__(self, name: str) -> Any:
        if name in _FACTS:
            return getattr(self.node.meta["example_value"], name)
        if name in _VIEWS:
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        return super().__getattr__(name)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __len__(self) -> int:
        return len(self.node.meta["example_value"])

    def __iter__(self) -> Iterator[Any]:
        return iter(self.unbind(0))

    def __bool__(self) -> bool:
        raise TraceError(f"{_user_line()} branches on the value of a tensor")

    def __float__(self) -> float:
        raise TraceError(f"{_user_line()} takes the value of a tensor as a number")

    __int__ = __index__ = __complex__ = __float__  # type: ignore[assignment]


class _Tracer(GraphAppendingTracer):
    """Computes every node on fake tensors as it is made; what is not a tensor becomes a constant."""

    def __init__(self, fake_mode: FakeTensorMode) -> None:
        super().__init__(fx.Graph())
        self.root = torch.nn.Module()
        self.fake_mode = fake_mode
        self.modes = _modes()

    def placeholder(self, name: str, tensor: Tensor) -> TracedTensor:
        node = self.graph.placeholder(name)
        node.meta["example_value"] = self._fake(tensor)
        return TracedTensor(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *unused: Any, **also_unused: Any) -> Any:
        _check_surroundings(self.modes)
        node = self.graph.create_node(kind, target, self.create_arg(args), self.create_arg(kwargs))
        node.meta["stack_trace"] = _stack_trace()
        node.meta["example_value"] = value = self._computed(node)
        return self._wrapped(node, value)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            return self._constant(a)
        return super().create_arg(a)

    def _wrapped(self, node: fx.Node, value: Any) -> Any:
        if isinstance(value, Tensor):
            return TracedTensor(node, self)
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
            parts = [self.create_proxy("call_function", operator.getitem, (fx.Proxy(node, self), i), {}) for i in range(len(value))]
            return type(value)(parts)
        if value is not None:  # a size, a dtype, a truth about the shape
            self.graph.erase_node(node)
        return value

    def _constant(self, tensor: Tensor) -> fx.Node:
        """A tensor of the function's surroundings: an attribute of the graph's module, the tensor itself."""
        for node in self.graph.find_nodes(op="get_attr"):
            if getattr(self.root, node.target) is tensor:
                return node
        name = f"constant_{len(list(self.graph.find_nodes(op='get_attr')))}"
        setattr(self.root, name, tensor) if isinstance(tensor, torch.nn.Parameter) else self.root.register_buffer(name, tensor)
        node = self.graph.get_attr(name)
        node.meta["example_value"] = self._fake(tensor)
        return node

    def _fake(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake_mode.from_tensor(tensor, static_shapes=True)

    def _computed(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda operand: operand.meta["example_value"])
        try:
            with self.fake_mode:
                return getattr(args[0], node.target)(*args[1:], **kwargs) if node.op == "call_method" else node.target(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise TraceError(f"{_user_line()} needs the values of a tensor ({error})") from error


def _modes() -> tuple[bool, ...]:
    return (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"))


def _check_surroundings(modes: tuple[bool, ...]) -> None:
    """A graph holds operations, not the modes they ran under, nor the backward of a custom autograd function."""
    frame = sys._getframe()
    while frame is not None and frame.f_code is not trace_function.__code__:
        if frame.f_code is _FUNCTION_APPLY:
            raise TraceError(f"{_user_line()} is part of a torch.autograd.Function, whose backward is not derived")
        frame = frame.f_back  # type: ignore[assignment]
    if _modes() != modes:
        raise TraceError(f"{_user_line()} runs under its own no_grad or autocast, which a graph would lose")


def _user_frame() -> Any:
    frame: Any = sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith(_OUTSIDE):
        frame = frame.f_back
    return frame


def _user_line() -> str:
    frame = _user_frame()
    if frame is None:
        return "the function"
    code = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    return f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}: {code}"


def _stack_trace() -> str:
    """The user's line, written as Dynamo writes it."""
    frame = _user_frame()
    if frame is None:
        return ""
    code = frame.f_code
    line = linecache.getline(code.co_filename, frame.f_lineno).strip()
    return f'  File "{code.co_filename}", line {frame.f_lineno}, in {code.co_name}\n    {line}\n'
