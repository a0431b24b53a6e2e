"""A compiled graph that no longer computes some of its outputs, with those outputs filled in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fxfuse.canonical.facts import module_path
from fxfuse.capture.context import current_module, current_role
from fxfuse.output_contract.source import Reads, Source, next_forward, remember
from fxfuse.output_contract.tensor import lazy_tensor, real
from fxfuse.reporting.records import GraphRecord

if TYPE_CHECKING:
    from torch import fx

    from fxfuse.linear_loss.lazy_output import LazyOutput


# Their dispatchers say when a forward begins. One forward may run several graphs, and read the logits of an earlier one in a later one.
AROUND = ("head", "stack")


class FilledOutputs:
    """Calls ``run``, which gives None for each of ``outputs``, and puts a lazy tensor there.

    mode: "lazy", or "never" for tensors that have a shape and no value. Without gradients the outputs are real.
    """

    def __init__(self, run: Callable[..., Any], outputs: Sequence[LazyOutput], mode: str, record: GraphRecord) -> None:
        self.run = run
        self.outputs = outputs
        self.reads = [Reads(site_of(output.graph) or record.module or "the graph", mode) for output in outputs]
        record.reads += self.reads

    def __call__(self, *args: Any) -> tuple:
        owner = current_module() or self
        if current_role() not in AROUND:
            next_forward(owner)
        args = tuple(map(real, args))
        sources = [Source(output, args, reads) for output, reads in zip(self.outputs, self.reads, strict=True)]
        results = list(self.run(*args))
        for source in sources:
            index = source.described.index
            if torch.is_grad_enabled():
                results[index] = lazy_tensor(source)
                remember(owner, source)
            else:
                results[index] = source.described.compute(source.described.pick(args))
        return tuple(results)


def site_of(graph: fx.GraphModule) -> str:
    """The module path that an output comes from, where the trace knows it (a module that lay on Python's stack has no path)."""
    paths = [module_path(node) for node in graph.graph.nodes if node.op == "call_function"]
    return next((path for path in reversed(paths) if path and "___stack" not in path), "")
