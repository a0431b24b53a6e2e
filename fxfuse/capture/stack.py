"""Capture of a forward that calls its blocks itself, as small models written in one piece do.

There is no backbone to keep out of the trace, and a graph break in the loop over the blocks would lose the
whole forward. So while Dynamo traces such a forward, each block is one opaque call in the graph, and the
backend compiles the stretches between those calls: what comes before the blocks, and the final norm, output
projection and loss after them. The blocks run through their own compile slots.

A block knows its place by two instance attributes: ``_fxfuse_position``, and a ``forward`` that is the class's
except under this trace. Both follow copies, as numbers and methods do, and mean nothing there.
"""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fxfuse.capture.context import GraphCompiler, current_call, is_tracing
from fxfuse.capture.expected import StackDeclined, check, expected, facts
from fxfuse.output_contract.tensor import real

# Set while a stack's forward is called, to a word for what is known of its blocks: what was traced before it was known is not run
# again. A global of this module, because Dynamo can read and guard one.
tracing_stack = ""
_words: list[str] = []  # of all threads


@contextmanager
def tracing(word: str) -> Iterator[None]:
    """Block calls are opaque under the trace of their stack."""
    global tracing_stack
    _words.append(word)
    tracing_stack = word
    try:
        yield
    finally:
        _words.remove(word)
        tracing_stack = _words[-1] if _words else ""


@functools.cache
def opaque_forward(forward: Callable) -> Callable:
    """``forward`` of a block's class, which the trace of a stack sees as one opaque call."""

    @functools.wraps(forward)
    def opaque(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if tracing_stack and torch.compiler.is_dynamo_compiling():  # (the other function is true on all threads)
            return call_block(self._fxfuse_position, *args, **kwargs)
        return forward(self, *args, **kwargs)

    return opaque


def call_block(position: int, *args: Any, **kwargs: Any) -> Any:
    """One node of a stack's graph: the block at ``position`` of whichever model is running."""
    stack: Any = current_call()
    if is_tracing():
        return expected(stack, position, args, kwargs)
    out = stack.run_block(stack.blocks[position], args, kwargs)
    check(stack, position, out, args, kwargs)
    return out


@dataclass(frozen=True)
class AroundBlocks:
    """Compiles the stretches between block calls with ``inner``; compared by value, as ``inner`` is."""

    inner: GraphCompiler

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable:
        reason = why_not_cut(gm)
        if reason:
            raise StackDeclined(reason)
        if not any(is_block(node) for node in gm.graph.nodes):
            return self.inner(gm, example_inputs)
        return Stitched(gm, self.inner)


def is_block(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is call_block


def why_not_cut(gm: fx.GraphModule) -> str:
    """Why a graph cannot be cut at its block calls, or nothing."""
    for node in gm.graph.nodes:
        name = getattr(node.target, "__name__", "")
        if name in ("_enter_autocast", "_exit_autocast", "_set_grad_enabled"):
            return f"its forward switches {name.strip('_').replace('_', ' ')} around its blocks"
    for child in gm.children():
        if isinstance(child, fx.GraphModule) and any(
            is_block(n) or why_not_cut(child) for n in child.graph.nodes
        ):
            return "its blocks are called inside a checkpoint or another region of their own"
    return ""


@dataclass
class Step:
    """A stretch of a graph, compiled or as it is, or one glue node (``run`` is None)."""

    run: Callable | None
    outputs: list[fx.Node]
    inputs: list[fx.Node]
    dead: list[fx.Node] = field(default_factory=list)  # values that nobody needs after this step


class Stitched:
    """A graph as compiled stretches and block calls, run in the graph's order.

    What lies before the first block and after the last is compiled. What lies between two blocks is compiled
    where it repeats: its kinds are then few, however many blocks there are. The rest of it runs as it is.
    """

    def __init__(self, gm: fx.GraphModule, inner: GraphCompiler) -> None:
        nodes = list(gm.graph.nodes)
        self.output = nodes[-1].args[0]
        self.inputs = [node for node in nodes if node.op == "placeholder"]
        self.constants = {n: operator.attrgetter(n.target)(gm) for n in nodes if n.op == "get_attr"}
        runs = list(stretches(nodes))
        parts = {i: cut_out(gm, run) for i, run in enumerate(runs) if not is_glue(run[0])}
        repeated = Counter(part.key for part in parts.values())
        compiled: dict[tuple, Callable] = {}
        self.steps: list[Step] = []
        for i, run in enumerate(runs):
            if is_glue(run[0]):
                self.steps += [Step(None, [node], node.all_input_nodes) for node in run]
                continue
            part = parts[i]
            if part.key not in compiled:
                at_an_end = i in (0, len(runs) - 1)
                compiled[part.key] = (
                    part.compiled(inner) if at_an_end or repeated[part.key] > 1 else part.gm.forward
                )
            self.steps.append(Step(compiled[part.key], part.outputs, part.inputs))
        self._find_last_uses()

    def _find_last_uses(self) -> None:
        alive = set(_nodes_in(self.output)) | set(self.constants)
        for step in reversed(self.steps):
            touched = dict.fromkeys([*step.outputs, *step.inputs])
            step.dead = [node for node in touched if node not in alive]
            alive.update(touched)

    def __call__(self, *args: Any) -> Any:
        values: dict[fx.Node, Any] = {**self.constants, **dict(zip(self.inputs, args, strict=True))}
        for step in self.steps:
            if step.run is None:
                node = step.outputs[0]
                given = fx.node.map_arg((node.args, node.kwargs), lambda n: real(values[n]))
                values[node] = node.target(*given[0], **given[1])  # type: ignore[operator]
            else:
                results = step.run(*[real(values[node]) for node in step.inputs])
                values.update(zip(step.outputs, results, strict=True))
            for node in step.dead:
                del values[node]
        return fx.node.map_arg(self.output, lambda n: values[n])


def _nodes_in(argument: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(argument, found.append)
    return found


def is_glue(node: fx.Node) -> bool:
    """A block call, or the choice of one of its results."""
    return is_block(node) or (node.target is operator.getitem and is_block(node.args[0]))  # type: ignore[arg-type]


def stretches(nodes: list[fx.Node]) -> Iterator[list[fx.Node]]:
    """The computing nodes in order, in runs of glue and of everything else."""
    run: list[fx.Node] = []
    for node in nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        if run and is_glue(node) != is_glue(run[-1]):
            yield run
            run = []
        run.append(node)
    if run:
        yield run


@dataclass
class Part:
    """A stretch as a graph of its own, and the nodes of the whole graph that it reads and gives."""

    gm: fx.GraphModule
    inputs: list[fx.Node]
    outputs: list[fx.Node]
    key: tuple  # equal for stretches that one compiled graph can serve

    def compiled(self, inner: GraphCompiler) -> Callable:
        return inner(self.gm, [node.meta["example_value"] for node in self.inputs])


def cut_out(gm: fx.GraphModule, stretch: list[fx.Node]) -> Part:
    """``stretch`` as a graph of its own: placeholders with the facts of what it reads, a tuple of what it gives."""
    inside = set(stretch)
    read = dict.fromkeys(used for node in stretch for used in node.all_input_nodes if used not in inside)
    inputs = [node for node in read if node.op != "get_attr"]
    outputs = [node for node in stretch if any(user not in inside for user in node.users)]
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(f"in_{len(copies)}")
        copies[node].meta = dict(node.meta)
    for node in read:
        if node.op == "get_attr":
            copies[node] = graph.node_copy(node)
    for node in stretch:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(tuple(copies[node] for node in outputs))
    return Part(fx.GraphModule(gm, graph), inputs, outputs, _signature(graph))


def _signature(graph: fx.Graph) -> tuple:
    """A graph without its names: what each node does, to which earlier nodes, and what is known of the inputs."""
    place = {node: f"%{i}" for i, node in enumerate(graph.nodes)}
    return tuple(
        facts([node.meta["example_value"]])
        if node.op == "placeholder"
        else (node.op, str(node.target), str(fx.node.map_arg((node.args, node.kwargs), lambda n: place[n])))
        for node in graph.nodes
    )
