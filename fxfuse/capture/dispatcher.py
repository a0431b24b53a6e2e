"""What stands in a module's compile slot and decides, call by call: eager, or the captured graph.

The slot is ``_compiled_call_impl``, which ``Module.compile`` fills too: keys, signatures, hooks and pickles
stay what they were. Eager is right for calls without gradients (``generate``, evaluation), inside other
people's tracers and modes, and for what Dynamo cannot capture.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from fxfuse._torch import (
    BackendCompilerFailed,
    FailOnRecompileLimitHit,
    TorchDynamoException,
)
from fxfuse.capture.cache import CacheArgument, find_cache, hand_over, layer_index, stand_in_for
from fxfuse.capture.checkpoint_inputs import send_checkpointed_input
from fxfuse.capture.collected_outputs import Collected
from fxfuse.capture.collector import collected_once
from fxfuse.capture.context import GraphCompiler, enter, leave
from fxfuse.capture.declines import (
    ON_SEVERAL_DEVICES,
    observed,
    on_several_devices,
    partitioned,
    replaced_by,
)
from fxfuse.capture.decorated import decorated
from fxfuse.capture.entering import entered, returned
from fxfuse.capture.expected import declined_in
from fxfuse.capture.governor import governed
from fxfuse.capture.head_unit import hooks_around
from fxfuse.capture.kind import Kind, broken_sentences, first_line, limit_sentence
from fxfuse.capture.marks import is_mark, mark_adapters
from fxfuse.capture.sharded_weights import restore_quantization
from fxfuse.capture.tail_calls import result_is_unread
from fxfuse.output_contract.source import next_forward
from fxfuse.output_contract.tensor import LazyTensor, real

if TYPE_CHECKING:
    from fxfuse.capture.install import Installation

logger = logging.getLogger("fxfuse")

RECOMPILE_LIMIT = 64
COMPARED = ("block", "leaf")  # run by their graphs in forwards without gradients too, while in training mode
CACHE_SENTENCE = "a key/value cache came with gradients on; train with use_cache=False"
GLOBAL_HOOK = "a hook for all modules is registered (torch.nn.modules.module.register_module_...), which would miss those inside"
LIMIT_IS_ARGUMENT = "recompile_limit" in inspect.signature(torch.compile).parameters


@functools.cache
def trampoline(cls: Any, forward: Callable) -> Callable:
    """``forward`` of ``cls`` behind a code object of its own.

    Dynamo counts recompilations per code object, and skips frames whose code lies in torch. Decorators make
    many classes share one code object; torch's own modules lie in torch. A copy per class cures both.
    """

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    code = call.__code__.replace(co_name=cls.__name__)
    return FunctionType(code, call.__globals__, cls.__name__, None, call.__closure__)


def compile_forward(cls: Any, backend: GraphCompiler) -> Callable:
    """The captured forward of a class of blocks or leaves: one graph or an exception, nothing in between."""
    return _compile(trampoline(cls, cls.forward), backend, fullgraph=True)


def compile_call(module: nn.Module, backend: GraphCompiler) -> Callable:
    """The captured call of a head, in as many pieces as the backbones inside it leave. Decorators of its forward run as they are."""
    inner, around = decorated(type(module).forward)
    whole = _compile(module._call_impl, backend, fullgraph=False)
    if inner is type(module).forward:
        return whole
    own, captured = type(module).forward, around(_compile(inner, backend, fullgraph=False))

    def call(*args: Any, **kwargs: Any) -> Any:
        if "forward" in vars(module) or type(module).forward is not own:  # somebody else's
            return whole(*args, **kwargs)
        with shown_as_forward(module, MethodType(captured, module)):
            return module._call_impl(*args, **kwargs)

    return call


@contextmanager
def shown_as_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """While ``forward`` is what Module.__call__ runs, its hooks around it."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own


def _compile(function: Callable, backend: GraphCompiler, fullgraph: bool) -> Callable:
    options: dict[str, Any] = {"recompile_limit": RECOMPILE_LIMIT} if LIMIT_IS_ARGUMENT else {}
    return torch.compile(function, backend=backend, dynamic=True, fullgraph=fullgraph, **options)


class Dispatcher:
    """The compile slot of one block, leaf or whole model."""

    runs_itself_alone = True  # its first call compiles, and runs little else

    def __init__(self, module: nn.Module, kind: Kind, installation: Installation) -> None:
        self.module = module
        self.kind = kind
        self.installation = installation
        self.broken: set[bool] = set()
        self.forward = type(module).forward
        self.compiled = installation.compiled_forward(type(module))
        self.collected = Collected()

    def follow(self, plan: str) -> None:
        """From the next call on, run the graph of a memory plan."""
        self.compiled = self.installation.compiled_forward(type(self.module), plan)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        if not wants_graph(args, kwargs) and not self._compares_with_training(args, kwargs):
            return module._call_impl(*args, **kwargs)
        reason = self._why_eager()
        if reason:
            self.kind.eager[reason] += 1
            return module._call_impl(*args, **kwargs)
        if not has_hooks(module):
            return self.run(*args, **kwargs)
        with shown_as_forward(module, self.run):  # the module's own hooks run in eager around it
            return module._call_impl(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The captured forward, or the module's own where that cannot be had."""
        restore_quantization(self.module)
        with self.collected.shown():
            found = find_cache(args, kwargs)
            if self._is_broken(with_cache=found is not None):
                return self.forward(self.module, *args, **kwargs)
            if found is not None:
                return self._run_with_cache(found, args, kwargs)
            unread = result_is_unread(sys._getframe(1))
            if self.kind.role == "block" and self.installation.governor is None:
                more = 0 if self.kind.captured else self.kind.modules - 1
                send_checkpointed_input(self.module, (*args, *kwargs.values()), more)
            done, out = self._try(args, kwargs, with_cache=False, unread=unread)
            return out if done else self._instead(args, kwargs)

    def _instead(self, args: tuple, kwargs: dict[str, Any], with_cache: bool = False) -> Any:
        """The module's own forward, for a call that could not be captured. Where that raises too, the call is to blame, not the
        module: the next one is captured again.
        """
        try:
            return self.forward(self.module, *args, **kwargs)
        except Exception:
            self._take_back(with_cache)
            raise

    def before_compiling(self) -> None:
        """Adapters anywhere in the model are made traceable: those of other modules of this kind share the graph."""
        model = self.installation.model()
        if model is not None:
            mark_adapters(model)
            self.installation.make_rooms(self.kind)

    def over_limit(self) -> None:
        """Dynamo will not make another graph for this module's code."""
        if not self.kind.limit:
            logger.warning("%s", limit_sentence(self.kind))
        self.kind.limit = True

    def _why_eager(self) -> str:
        """A reason, found at call time, to leave the captured graph alone."""
        own = self.module.__dict__.get("forward")
        self._follow_class()
        if type(self.module).forward is not self.forward or not (own is None or is_mark(own)):
            if on_several_devices(self.module):
                return ON_SEVERAL_DEVICES
            return "its forward was replaced after fxfuse.optimize; call fxfuse.restore and optimize again"
        return observed() or missed_hooks(self.module) or partitioned(self.module)

    def _follow_class(self) -> None:
        """FSDP2 gives a module a class of its own, derived from the module's; transformers 5.23 wraps its forward once more."""
        forward: Any = type(self.module).forward
        if forward is not self.forward and getattr(forward, "__wrapped__", None) is self.forward:
            self.forward, self.compiled = forward, self.installation.compiled_forward(type(self.module))

    def _compares_with_training(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether this is a forward without gradients amid training: of a reference, or of a policy before its update.

        Its result is subtracted from what training computes, so it is computed by the same kernels: a difference between theirs and
        eager's rounding, summed over the tokens of a sequence, would pass for a difference between the models.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # (first: Dynamo does not trace what follows)
            return False
        return (self.module.training and self.kind.role in COMPARED
                and not torch.is_inference_mode_enabled() and find_cache(args, kwargs) is None)  # fmt: skip

    def _run_with_cache(self, found: CacheArgument, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The captured forward on a stand-in for the cache, where this block's place in it is empty."""
        index = layer_index(self.module)
        stand_in = None if index is None else stand_in_for(found.cache, index)
        if stand_in is None or index is None:
            self.kind.eager[CACHE_SENTENCE] += 1
            return self.forward(self.module, *args, **kwargs)
        done, out = self._try(*found.replaced(args, kwargs, stand_in), with_cache=True)
        if not done:
            return self._instead(args, kwargs, with_cache=True)
        hand_over(stand_in, found.cache, index)
        return out

    def _try(self, args: tuple, kwargs: dict[str, Any], with_cache: bool, unread: bool = False) -> tuple[bool, Any]:
        """(True, result of the captured forward), or (False, None) where Dynamo could not capture it."""
        shared = self.kind.role == "block" and self.kind.modules > 1
        entry = entered(self.module, args) if shared else args
        self.installation.enter_rooms(self.module, self.kind)
        enter(self, unread, entry, kwargs)
        try:
            with collected_once(self.runs_itself_alone and not self.kind.captured):
                out = returned(self.compiled(self.module, *entry, **kwargs), entry, args)
        except FailOnRecompileLimitHit:
            self.over_limit()
            return False, None
        except TorchDynamoException as error:
            if self.kind.role != "stack" and (declined := declined_in(error)) is not None:
                raise declined from error  # it is about the forward around this module
            if any(type(value) is LazyTensor for value in (*args, *kwargs.values())):  # which Dynamo cannot trace
                return self._try(tuple(map(real, args)), {name: real(value) for name, value in kwargs.items()}, with_cache)
            self._give_up(error, with_cache)
            return False, None
        finally:
            leave()
        self.kind.captured = True
        if self.installation.governor is not None and torch.is_grad_enabled():
            self.installation.governor.ran(self, out)
        return True, out

    def _is_broken(self, with_cache: bool) -> bool:
        return with_cache in self.broken or with_cache in self.kind.broken

    def _give_up(self, error: Exception, with_cache: bool) -> None:
        """Dynamo cannot capture this module: eager from now on, and its parts are captured instead.

        If it never captured one of its kind, it is spared the others.
        """
        raise_if_strict(error, self.installation.strict)
        reason = first_line(error)
        if self.kind.captured:
            self.broken.add(with_cache)
            self.kind.broken_modules[reason] += 1
            self.installation.descend(self.kind, self.module)
        else:
            self.kind.broken[with_cache] = reason
            self.installation.descend(self.kind)
        logger.warning("%s", broken_sentences(self.kind)[-1])

    def _take_back(self, with_cache: bool) -> None:
        """What the last ``_give_up`` has written down. Parts that are captured by now stay so: they are traced with the whole."""
        if with_cache in self.broken:
            self.broken.discard(with_cache)
            self.kind.broken_modules[next(reversed(self.kind.broken_modules))] -= 1
            self.kind.broken_modules += Counter()  # (without zeros)
        else:
            self.kind.broken.pop(with_cache, None)

    def __reduce__(self) -> tuple:
        """Copies and pickles of a module have an empty slot."""
        return type(None), ()


class WholeDispatcher(Dispatcher):
    """The compile slot of a model without blocks, captured as one."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return governed(self.module, super().__call__, args, kwargs)


class HeadDispatcher(Dispatcher):
    """The compile slot of the top-level module, whose backbones are kept out of its trace."""

    runs_itself_alone = False

    def __init__(self, module: nn.Module, kind: Kind, installation: Installation) -> None:
        self.module = module
        self.kind = kind
        self.installation = installation
        self.compiled = compile_call(module, installation.backend)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        next_forward(self.module)
        if self.kind.broken or not wants_graph(args, kwargs):
            return self.module._call_impl(*args, **kwargs)
        reason = self._why_eager_call(args, kwargs)
        if reason:
            self.kind.eager[reason] += 1
            return self.module._call_impl(*args, **kwargs)
        enter(self, args=args, kwargs=kwargs)
        try:
            with hooks_around(self.module):
                out = self.compiled(*args, **kwargs)
            if self.installation.governor is not None and torch.is_grad_enabled():
                self.installation.governor.ran(self, out)
            return out
        except TorchDynamoException as error:
            raise_if_strict(error, self.installation.strict)
            self.kind.broken[False] = first_line(error)
            logger.warning("%s", broken_sentences(self.kind)[-1])
        finally:
            leave()
        try:
            return self.module._call_impl(*args, **kwargs)
        except Exception:
            self.kind.broken.pop(False, None)
            raise

    def _why_eager_call(self, args: tuple, kwargs: dict[str, Any]) -> str:
        reason = observed()
        if reason:
            return reason
        owner = replaced_by(self.module)
        if owner:
            return f"its forward is that of {owner}; its blocks run fused, what that does around them is its own"
        # A call that fails half-way is repeated; a cache given by the caller would then be written twice.
        return missed_hooks(self.module) or partitioned(self.module) or (CACHE_SENTENCE if find_cache(args, kwargs) is not None else "")


class EagerDispatcher(Dispatcher):
    """The compile slot of a top-level module that is not captured: it only marks the model as optimized."""

    def __init__(self, module: nn.Module, installation: Installation) -> None:
        self.module = module
        self.installation = installation

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return governed(self.module, self.module._call_impl, args, kwargs)


def wants_graph(args: Iterable[Any], kwargs: dict[str, Any]) -> bool:
    """Whether this call takes part in training.

    Without gradients it does not (``generate``, evaluation), with one exception: the first pass of reentrant
    checkpointing runs without gradients on inputs that require them, and must compute what the recomputation
    in the backward will. (A reference's pass is another matter: see ``Dispatcher``.)
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


def missed_hooks(module: nn.Module) -> str:
    """Why a module with others inside is not captured while every module has a hook, or nothing."""
    return GLOBAL_HOOK if _has_any_global_hook() and any(module.children()) else ""


def raise_if_strict(error: BaseException, strict: bool) -> None:
    """Under ``strict`` an error inside our backend is raised; what Dynamo cannot trace never is."""
    if strict and isinstance(error, BackendCompilerFailed):
        raise error
