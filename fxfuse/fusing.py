"""``fuse``: one plain PyTorch function becomes one fused op. ``rewrite``: one FX graph becomes one with fused ops."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from ._torch import FakeTensorMode, functorch_level
from .backend import copy_of
from .canonical.facts import tensor_of, user_line
from .canonical.vocabulary import VIEWS
from .errors import UnsupportedGraph
from .fused_op import is_foreign
from .leaf_modules import open_leaf_modules
from .regions.trace import trace_region
from .residuals import plan_residuals
from .rewriting import Options, rewrite_graph
from .surgery import erase_dead, replace_region, sort_topologically

Function = TypeVar("Function", bound=Callable[..., Any])


def fuse(function: Function) -> Function:
    """A fused, differentiable version of a plain function of tensors, for the CPU and GPUs.

    The function must be one row program: pointwise operations, reductions and slices of the last dimension. It is traced once for
    each combination of dtypes, dimensions, widths and constants that it is called with; the number of rows is free.
    Gradients of any order are derived. What cannot be fused raises UnsupportedGraph, which names the operation.
    """
    if not callable(function) or isinstance(function, torch.nn.Module):
        raise TypeError(f"fxfuse.fuse takes a function of tensors, got {type(function).__name__}; for modules there is fxfuse.optimize")
    signature = inspect.signature(function)
    instances: dict[tuple, fx.GraphModule] = {}

    @functools.wraps(function)
    def fused(*args: Any, **kwargs: Any) -> Any:
        if functorch_level() is not None:
            return function(*args, **kwargs)  # torch.func transforms it as any function; they cannot see into our op
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        tensors = [value for value in _values(bound) if isinstance(value, Tensor)]
        key = tuple(_identity(value) for value in _values(bound))
        if key not in instances:
            _check(function, tensors)
            instances[key] = _traced(function, bound, tensors)
        return instances[key](*tensors)

    return fused  # type: ignore[return-value]


def _values(bound: inspect.BoundArguments) -> list[Any]:
    """All arguments in order, those of ``*args`` and ``**kwargs`` one by one."""
    values: list[Any] = []
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            values += value
        elif kind is inspect.Parameter.VAR_KEYWORD:
            values += [item for pair in sorted(value.items()) for item in pair]
        else:
            values.append(value)
    return values


def _identity(value: Any) -> Any:
    """What of an argument the traced graph depends on."""
    if not isinstance(value, Tensor):
        return type(value), value
    broadcast = tuple(size == 1 for size in value.shape[:-1])
    wanted = value.requires_grad and torch.is_grad_enabled()
    return type(value), value.dtype, broadcast, value.shape[-1:], wanted


def _check(function: Callable[..., Any], tensors: Sequence[Tensor]) -> None:
    name = getattr(function, "__name__", "the function")
    if not tensors:
        raise UnsupportedGraph(f"{name}: no argument is a tensor, so there is nothing to fuse")
    for tensor in tensors:
        if is_foreign(tensor):
            raise UnsupportedGraph(f"{name}: an argument is a {type(tensor).__name__}; "
                                   "fused functions take plain tensors, pass its local part")


def _traced(function: Callable[..., Any], bound: inspect.BoundArguments, tensors: Sequence[Tensor]) -> fx.GraphModule:
    """The function's graph, one fused op between views."""

    def of_tensors(*given: Tensor) -> Any:
        remaining = iter(given)
        renewed = {
            name: _with_tensors(value, remaining) for name, value in bound.arguments.items()
        }
        again = inspect.BoundArguments(bound.signature, renewed)  # type: ignore[arg-type]
        return function(*again.args, **again.kwargs)

    of_tensors.__name__ = getattr(function, "__name__", "the function")
    gm, region = trace_region(of_tensors, *tensors)
    members = {*region.nodes}
    for node in gm.graph.nodes:
        if node.op.startswith("call_") and node not in members and node.target not in VIEWS:
            where = f" ({line})" if (line := user_line(node)) else ""
            raise UnsupportedGraph(f"{of_tensors.__name__} is not one row program: {node.name}{where} stands outside of it; "
                                   "fuse the part around it")
    wanted = tuple(a.name for view, a in zip(region.arguments, region.program.arguments, strict=True)
                   if a.kind == "real" and (t := tensor_of(view.node)) is not None and t.requires_grad)
    program = plan_residuals(region.program, wanted) if wanted and torch.is_grad_enabled() else region.program
    replace_region(gm.graph, region, program)
    sort_topologically(gm.graph)
    erase_dead(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return gm


def _with_tensors(value: Any, tensors: Any) -> Any:
    """The argument with every tensor in it replaced by the next one."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, tuple):
        return tuple(_with_tensors(item, tensors) for item in value)
    if isinstance(value, dict):
        return {key: _with_tensors(value[key], tensors) for key in sorted(value)}
    return value


def rewrite(gm: fx.GraphModule, example_inputs: Sequence[Any] | None = None, *, validate: str = "fast",
            strict: bool = False) -> fx.GraphModule:
    """A graph with functional fused ops in place of what can be fused; the graph that came in is not changed.

    ``gm`` comes from ``torch.fx.symbolic_trace``, Dynamo or ``torch.export``. Where its nodes say nothing of shapes and dtypes,
    ``example_inputs`` are needed to find them (fake tensors will do). The result is self-contained and differentiable any
    number of times; memory plans belong to ``fxfuse.optimize`` and the backend.
    """
    if not isinstance(gm, fx.GraphModule):
        raise TypeError(f"fxfuse.rewrite takes a torch.fx.GraphModule, got {type(gm).__name__}")
    work = copy_of(gm)
    open_leaf_modules(work)
    if not _knows_shapes(work):
        if example_inputs is None:
            raise ValueError("the nodes of this graph say nothing of shapes and dtypes: pass example_inputs to fxfuse.rewrite")
        _propagate(work, tuple(example_inputs))
    rewrite_graph(work, Options(lambda rule: "", validate, strict, all_differentiable=True))
    return work


def _knows_shapes(gm: fx.GraphModule) -> bool:
    return all("example_value" in node.meta or "val" in node.meta for node in gm.graph.nodes if node.op == "placeholder")


def _propagate(gm: fx.GraphModule, example_inputs: tuple[Any, ...]) -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    FakeTensorProp(gm, mode).propagate(*example_inputs)
