"""Where traces are taken and given: AOTAutograd's two passes, of the graphs that the backend hands to it.

torch calls both by their names in its modules. The names are bound once to functions that do what torch's do, except while this thread
compiles under ``remembered``: then the first looks whether the trace is kept, and both give what was kept; or the second keeps what
torch made. Nothing is kept of a trace that found out something about sizes (a guard, a range), and nothing that would not be read
as what it was: it is read once before it is kept.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from .. import earlier_runs
from .._torch import (
    FakeTensorMode,
    TracingContext,
    aot_entry,
    detach_with_memo,
    disable_current_modes,
    graph_compile,
    no_python_dispatcher,
)
from . import files
from .asked import Unknown, text_of, text_of_graph, text_of_inputs, text_of_sizes
from .conditions import conditions
from .graphs import read, text_of_trace, write

logger = logging.getLogger("fxfuse")

counts: Counter[str] = Counter()  # "taken" from an earlier run, "kept" for a later one, "left" (why: the log)


class _Trace:
    """One graph on its way through AOTAutograd."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.asked = ""  # what is to be kept with the trace, nothing where it is not to be kept
        self.sizes = ""
        self.inputs: list[Any] | None = None
        self.joint: fx.GraphModule | None = None

    def metadata(self, collect: Callable[..., Any], inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """AOTAutograd's first pass over these inputs, or what was kept of it."""
        self.inputs = list(inputs)
        try:
            self.sizes = text_of_sizes(_mode().shape_env)
            asked = _asked(self.gm, inputs, named, self.sizes)
            data = files.load(asked)
            if data is not None:
                with _undisturbed():
                    self.joint, found = read(data, _mode(), self.gm.graph)
                return found
            self.asked = asked
        except Unknown as reason:
            self._left(reason)
        except Exception as error:  # a file by another hand can fail in any way
            logger.debug("a kept trace was not read", exc_info=error)
            self._left(error)
        return collect(*inputs)

    def traced(self, trace: Callable[..., Any], inputs: Sequence[Any], descriptions: Sequence[Any], metadata: Any,
               everything: tuple[Any, ...]) -> Any:
        """AOTAutograd's second pass, or the joint graph that was kept."""
        if self.inputs is None or len(inputs) != len(self.inputs) or any(a is not b for a, b in zip(inputs, self.inputs, strict=True)):
            self.asked, joint = "", None  # (AOTAutograd made other inputs of these)
        else:
            joint = self.joint
        if joint is not None:
            counts["taken"] += 1
            given = tree_map_only(Tensor, detach_with_memo, (list(inputs), metadata.traced_tangents))
            return joint, given, (descriptions, metadata.traced_tangents_descs), None
        result = trace(*everything, fw_metadata=metadata)
        if self.asked:
            try:
                self._keep(result, metadata)
            except Unknown as reason:
                self._left(reason)
        return result

    def _keep(self, result: tuple[Any, ...], metadata: Any) -> None:
        joint, _, _, subclasses = result
        if subclasses is not None:
            raise Unknown("tensors of subclasses")
        if text_of_sizes(_mode().shape_env) != self.sizes:
            raise Unknown("a trace that learnt something about sizes")
        with _undisturbed():
            data = write(joint, metadata, self.gm.graph)
            again = read(data, _mode(), self.gm.graph)
            if text_of_trace(*again) != text_of_trace(joint, metadata):
                raise Unknown("a trace that is not read as it was")
        if text_of_sizes(_mode().shape_env) != self.sizes:
            raise Unknown("a trace whose reading learns something about sizes")
        files.keep(self.asked, data)
        counts["kept"] += 1

    def _left(self, reason: Exception) -> None:
        self.asked = ""
        counts["left"] += 1
        logger.debug("the trace of a graph is not kept: %s", reason)


_current: ContextVar[_Trace | None] = ContextVar("earlier_trace", default=None)


@contextmanager
def remembered(gm: fx.GraphModule) -> Iterator[None]:
    """While AOTAutograd compiles this graph, its trace is that of an earlier run, where one is kept."""
    if not earlier_runs.enabled():
        yield
        return
    _install()
    token = _current.set(_Trace(gm))
    try:
        yield
    finally:
        _current.reset(token)


def _asked(gm: fx.GraphModule, inputs: Sequence[Any], named: dict[str, Any], sizes: str) -> str:
    devices = {value.device for value in inputs if isinstance(value, Tensor)}
    facts = {key: value for key, value in named.items() if key != "flat_args_descs"}
    described = repr(named.get("flat_args_descs"))
    return "\n\n".join([conditions(devices), text_of_graph(gm), text_of_inputs(inputs), text_of(facts), described, sizes])


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Outside the modes under which AOTAutograd traces."""
    with disable_current_modes(), no_python_dispatcher(), torch.no_grad():
        yield


def _mode() -> FakeTensorMode:
    context = TracingContext.try_get()
    if context is None or context.fake_mode is None:
        raise Unknown("a graph that Dynamo did not trace")
    return context.fake_mode


@cache
def _install() -> None:
    """Bind torch's names to functions that ask for a kept trace first."""
    collecting, tracing = aot_entry.run_functionalized_fw_and_collect_metadata, graph_compile.aot_dispatch_autograd_graph

    def collect(function: Callable[..., Any], **named: Any) -> Callable[..., Any]:
        now = _current.get()
        original = collecting(function, **named)
        if now is None or now.inputs is not None:
            return original
        return lambda *inputs: now.metadata(original, inputs, named)

    def trace(function: Any, inputs: Any, descriptions: Any, config: Any, *, fw_metadata: Any) -> Any:
        now = _current.get()
        if now is None:
            return tracing(function, inputs, descriptions, config, fw_metadata=fw_metadata)
        return now.traced(tracing, inputs, descriptions, fw_metadata, (function, inputs, descriptions, config))

    aot_entry.run_functionalized_fw_and_collect_metadata = collect
    graph_compile.aot_dispatch_autograd_graph = trace
