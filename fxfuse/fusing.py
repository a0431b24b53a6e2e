"""``fuse``: one plain PyTorch function becomes one fused op. ``rewrite``: one FX graph becomes one with fused ops."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._pytree import tree_flatten, tree_unflatten

from ._torch import FakeTensorMode
from .backend import copy_of
from .canonical.facts import tensor_of, user_line
from .canonical.vocabulary import VIEWS
from .capture.declines import transformed
from .errors import UnsupportedGraph
from .fused_op import is_foreign
from .leaf_modules import open_leaf_modules
from .regions.trace import trace_region
from .residuals import plan_residuals
from .rewriting import Options, rewrite_graph
from .surgery import erase_dead, replace_region, sort_topologically
from .surroundings import surroundings
from .tracing import trace_function

Function = TypeVar("Function", bound=Callable[..., Any])


def fuse(function: Function) -> Function:
    """A fused, differentiable version of a plain function of tensors, for the CPU and GPUs.

    The function must be one row program: pointwise operations, reductions and slices of the last dimension. It is traced once for
    each combination of dtypes, dimensions, widths and constants that it is called with, or that its code reads (globals, what it
    closes over, attributes of ``self``). The number of rows is free, unless the function computes with it.
    Gradients of any order are derived. What cannot be fused raises UnsupportedGraph, which names the operation.
    """
    if not callable(function) or isinstance(function, torch.nn.Module):
        raise TypeError(f"fxfuse.fuse takes a function of tensors, got {type(function).__name__}; for modules there is fxfuse.optimize")
    signature = inspect.signature(function)
    constants = surroundings(function)
    instances: dict[tuple, Instance] = {}

    @functools.wraps(function)
    def fused(*args: Any, **kwargs: Any) -> Any:
        if transformed():
            return function(*args, **kwargs)  # torch transforms it as any function; its transforms cannot see into our op
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        call = Call(function, bound, *_leaves(bound))
        if not call.tensors:
            call.check()
        key = (call.structure, constants(call.leaves), *map(_identity, call.tensors), *_autocast(call.tensors[0].device.type))
        instance = instances.get(key)
        if instance is None:
            call.check()
            gm = _traced(call)
            instance = instances[key] = Instance({} if _computes_with_rows(call) else gm)
            if isinstance(instance.graphs, dict):
                instance.graphs[call.shapes()] = gm
        return instance.graph_for(call)(*call.tensors)

    fused.function = function  # type: ignore[attr-defined]  # what ``derive`` derives
    return fused  # type: ignore[return-value]


def _identity(tensor: Tensor) -> tuple:
    """What of a tensor the traced graph depends on."""
    broadcast = tuple(size == 1 for size in tensor.shape[:-1])
    wanted = tensor.requires_grad and torch.is_grad_enabled()
    return type(tensor), tensor.dtype, broadcast, tensor.shape[-1:], wanted


def _autocast(device: str) -> tuple:
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _leaves(bound: inspect.BoundArguments) -> tuple[list[Any], Any]:
    """The arguments, containers taken apart, and how they are put together again: None where there is none."""
    values = tuple(bound.arguments.values())
    if any(isinstance(value, tuple | list | dict) for value in values):
        return tree_flatten(values)
    return list(values), None


class Call:
    """A call of a function, by the leaves of its arguments."""

    def __init__(self, function: Callable[..., Any], bound: inspect.BoundArguments, leaves: list[Any], structure: Any) -> None:
        self.function, self.bound, self.leaves, self.structure = function, bound, leaves, structure
        self.tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.name = getattr(function, "__name__", "the function")

    def shapes(self) -> tuple[torch.Size, ...]:
        return tuple(tensor.shape for tensor in self.tensors)

    def check(self) -> None:
        """Raise for what cannot be traced."""
        if not self.tensors:
            raise UnsupportedGraph(f"{self.name}: no argument is a tensor, so there is nothing to fuse")
        for tensor in self.tensors:
            if is_foreign(tensor):
                raise UnsupportedGraph(f"{self.name}: an argument is a {type(tensor).__name__}; "
                                       "fused functions take plain tensors, pass its local part")

    def of_tensors(self) -> Callable[..., Any]:
        """The function of its tensors alone, in order."""

        def of_tensors(*given: Tensor) -> Any:
            remaining = iter(given)
            leaves = [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
            renewed = leaves if self.structure is None else tree_unflatten(leaves, self.structure)
            arguments = dict(zip(self.bound.arguments, renewed, strict=True))
            again = inspect.BoundArguments(self.bound.signature, arguments)  # type: ignore[arg-type]
            return self.function(*again.args, **again.kwargs)

        of_tensors.__name__ = self.name
        return of_tensors


@dataclass
class Instance:
    """The graph of calls of one key; or, of a function that computes with a number of rows, a graph for each combination of shapes."""

    graphs: fx.GraphModule | dict[tuple[torch.Size, ...], fx.GraphModule]

    def graph_for(self, call: Call) -> fx.GraphModule:
        if not isinstance(self.graphs, dict):
            return self.graphs
        shapes = call.shapes()
        if shapes not in self.graphs:
            self.graphs[shapes] = _traced(call)
        return self.graphs[shapes]


# A function that computes with a number of rows, or decides by it, is taken to show it at one of these.
OTHER_SIZES: tuple[Callable[[int], int], ...] = (lambda n: n + 2, lambda n: n + 8192, lambda n: max(2, n // 2))


def _computes_with_rows(call: Call) -> bool:
    """Does the trace hold a number of rows: for other ones, is it another trace, or none."""
    with FakeTensorMode():
        others = [[_resized(tensor, other) for tensor in call.tensors] for other in OTHER_SIZES]
    try:
        texts = {_text(trace_function(call.of_tensors(), *given)) for given in (call.tensors, *others)}
    except (UnsupportedGraph, RuntimeError, ValueError, IndexError):
        return True
    return len(texts) > 1


def _resized(tensor: Tensor, other: Callable[[int], int]) -> Tensor:
    """A fake tensor like this one, whose leading dimensions have other sizes where they are not 1."""
    shape = [size if size == 1 else other(size) for size in tensor.shape[:-1]] + list(tensor.shape[-1:])
    strides, taken = [0] * len(shape), 1
    for dim in sorted(range(len(shape)), key=lambda d: (tensor.stride(d), -d)):
        if tensor.stride(dim) or shape[dim] == 1:
            strides[dim], taken = taken, taken * shape[dim]
    like = torch.empty_strided(shape, strides, dtype=tensor.dtype, device=tensor.device)
    return like.requires_grad_(tensor.requires_grad)


def _text(gm: fx.GraphModule) -> str:
    return "\n".join(str(node.format_node()) for node in gm.graph.nodes)


def _traced(call: Call) -> fx.GraphModule:
    """The function's graph, one fused op between views."""
    gm, region = trace_region(call.of_tensors(), *call.tensors)
    members = {*region.nodes}
    for node in gm.graph.nodes:
        if node.op.startswith("call_") and node not in members and node.target not in VIEWS:
            where = f" ({line})" if (line := user_line(node)) else ""
            raise UnsupportedGraph(f"{call.name} is not one row program: {node.name}{where} stands outside of it; "
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
