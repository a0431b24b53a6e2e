"""What stands in a module's compile slot and decides, call by call: eager, or the captured graph.

The slot is ``_compiled_call_impl``, which ``Module.compile`` fills too: keys, signatures, hooks and pickles
stay what they were. Eager is right for calls without gradients (``generate``, evaluation), inside other
people's tracers and modes, and for what Dynamo cannot capture.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from fxfuse._torch import (
    BackendCompilerFailed,
    FailOnRecompileLimitHit,
    TorchDynamoException,
    functorch_level,
    in_foreign_dispatch_mode,
)
from fxfuse.capture.cache import find_cache, hand_over, layer_index, stand_in_for
from fxfuse.capture.context import GraphCompiler, enter, leave

if TYPE_CHECKING:
    from fxfuse.capture.install import Installation

logger = logging.getLogger("fxfuse")

RECOMPILE_LIMIT = 64
_LIMIT_IS_ARGUMENT = "recompile_limit" in inspect.signature(torch.compile).parameters


@dataclass
class Kind:
    """What is known of all modules of one kind; shared by their dispatchers."""

    name: str
    role: str  # "block", "leaf", "whole", "head", "part"
    modules: int = 0
    broken: str = ""  # why Dynamo cannot capture it
    limit: bool = False  # ran eager because Dynamo's recompile limit was reached
    cache_breaks: bool = False  # the cache stand-in did not serve it
    eager: Counter[str] = field(default_factory=Counter)  # calls that ran eager though gradients were on


@functools.cache
def trampoline(cls: type, forward: Callable) -> Callable:
    """``forward`` of ``cls`` behind a code object of its own.

    Dynamo counts recompilations per code object, and skips frames whose code lies in torch. Decorators make
    many classes share one code object; torch's own modules lie in torch. A copy per class cures both.
    """

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    code = call.__code__.replace(co_name=cls.__name__)
    return FunctionType(code, call.__globals__, cls.__name__, None, call.__closure__)


def compile_forward(cls: type, backend: GraphCompiler) -> Callable:
    """The captured forward of a class of blocks or leaves: one graph or an exception, nothing in between."""
    return _compile(trampoline(cls, cls.forward), backend, fullgraph=True)


def compile_call(module: nn.Module, backend: GraphCompiler) -> Callable:
    """The captured call of a head, in as many pieces as the backbones inside it leave."""
    return _compile(module._call_impl, backend, fullgraph=False)


def _compile(function: Callable, backend: GraphCompiler, fullgraph: bool) -> Callable:
    options: dict[str, Any] = {"recompile_limit": RECOMPILE_LIMIT} if _LIMIT_IS_ARGUMENT else {}
    return torch.compile(function, backend=backend, dynamic=True, fullgraph=fullgraph, **options)


class Dispatcher:
    """The compile slot of one block, leaf or whole model."""

    def __init__(self, module: nn.Module, kind: Kind, installation: Installation) -> None:
        self.module = module
        self.kind = kind
        self.installation = installation
        self.forward = type(module).forward
        self.compiled = installation.compiled_forward(type(module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.kind.broken or not wants_graph(args, kwargs):
            return self.eager(*args, **kwargs)
        reason = self._why_eager()
        if reason:
            self.kind.eager[reason] += 1
            return self.eager(*args, **kwargs)
        found = find_cache(args, kwargs)
        if found is None:
            return self._captured(args, kwargs)
        return self._captured_with_cache(found, args, kwargs)

    def eager(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own call, as if nothing were installed."""
        return self.module._call_impl(*args, **kwargs)

    def over_limit(self) -> None:
        """Dynamo will not make another graph for this module's code."""
        if not self.kind.limit:
            logger.warning("%s", limit_sentence(self.kind))
        self.kind.limit = True

    def _why_eager(self) -> str:
        """A reason, found at call time, to leave the captured graph alone."""
        if "forward" in self.module.__dict__ or type(self.module).forward is not self.forward:
            return "its forward was replaced after fxfuse.optimize; call fxfuse.optimize again"
        if functorch_level() is not None:
            return "a torch.func transform was active"
        if in_foreign_dispatch_mode():
            return "a TorchDispatchMode was active"
        return ""

    def _captured(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        try:
            return self._call_compiled(args, kwargs)
        except FailOnRecompileLimitHit:
            self.over_limit()
        except TorchDynamoException as error:
            self._give_up(error)
        return self.eager(*args, **kwargs)

    def _captured_with_cache(self, found: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        index = layer_index(self.module)
        stand_in = None if self.kind.cache_breaks or index is None else stand_in_for(found.cache, index)
        if stand_in is None or index is None:
            self.kind.eager["a key/value cache came with gradients on; train with use_cache=False"] += 1
            return self.eager(*args, **kwargs)
        try:
            out = self._call_compiled(*found.replaced(args, kwargs, stand_in))
        except FailOnRecompileLimitHit:
            self.over_limit()
            return self.eager(*args, **kwargs)
        except TorchDynamoException as error:
            if strict_failure(error, self.installation.strict):
                raise
            self.kind.cache_breaks = True
            return self._captured_with_cache(found, args, kwargs)
        hand_over(stand_in, found.cache, index)
        return out

    def _call_compiled(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        enter(self)
        try:
            if not has_hooks(self.module):
                return self.compiled(self.module, *args, **kwargs)
            return self._call_with_hooks(args, kwargs)
        finally:
            leave()

    def _call_with_hooks(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The module's own hooks run in eager around the captured forward, as Module.__call__ runs them."""
        self.module.__dict__["forward"] = functools.partial(self.compiled, self.module)
        try:
            return self.module._call_impl(*args, **kwargs)
        finally:
            del self.module.__dict__["forward"]

    def _give_up(self, error: TorchDynamoException) -> None:
        """Dynamo cannot capture this kind: eager from now on, and its parts are tried instead."""
        if strict_failure(error, self.installation.strict):
            raise error
        self.kind.broken = first_line(error)
        logger.warning("%s", broken_sentence(self.kind))
        self.installation.descend(self.kind)

    def __reduce__(self) -> tuple:
        """Copies and pickles of a module have an empty slot."""
        return type(None), ()


class HeadDispatcher(Dispatcher):
    """The compile slot of the top-level module, whose backbones are kept out of its trace."""

    def __init__(self, module: nn.Module, kind: Kind, installation: Installation) -> None:
        self.module = module
        self.kind = kind
        self.installation = installation
        self.compiled = compile_call(module, installation.backend)

    def _why_eager(self) -> str:
        return "another tracer or mode was active" if functorch_level() is not None or in_foreign_dispatch_mode() else ""

    def _captured_with_cache(self, found: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A cache given by the caller would be written twice if the call had to be repeated."""
        self.kind.eager["a key/value cache came with gradients on"] += 1
        return self.eager(*args, **kwargs)

    def _call_compiled(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        enter(self)
        try:
            return self.compiled(*args, **kwargs)
        finally:
            leave()


class EagerDispatcher(Dispatcher):
    """The compile slot of a top-level module that is not captured: it only marks the model as optimized."""

    def __init__(self, module: nn.Module, installation: Installation) -> None:
        self.module = module
        self.installation = installation

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module._call_impl(*args, **kwargs)


def wants_graph(args: Iterable[Any], kwargs: dict[str, Any]) -> bool:
    """Whether this call takes part in training.

    Without gradients it does not (``generate``, evaluation), with one exception: the first pass of reentrant
    checkpointing runs without gradients on inputs that require them, and must compute what the recomputation
    in the backward will.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return torch.is_grad_enabled() or any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in (*args, *kwargs.values())
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether Module.__call__ would run any hook around this module's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    )


def strict_failure(error: BaseException, strict: bool) -> bool:
    """Under ``strict`` an error inside our backend is raised; what Dynamo cannot trace never is."""
    return strict and isinstance(error, BackendCompilerFailed)


def first_line(error: BaseException) -> str:
    """The first sentence of a Dynamo error; the rest is advice for people who write the model."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    explanation = next((line for line in lines if line.startswith("Explanation: ")), "")
    return " ".join(part for part in (lines[0] if lines else type(error).__name__, explanation) if part)


def broken_sentence(kind: Kind) -> str:
    return f"{kind.name} ({kind.modules} modules) stays eager and its parts are captured instead: {kind.broken}"


def limit_sentence(kind: Kind) -> str:
    return (
        f"{kind.name} ({kind.modules} modules) reached Dynamo's recompile limit; calls of a new sort run eager from "
        f"here on. See TORCH_LOGS=recompiles for what differs between calls"
    )
