"""Which module a graph is compiled or run for, and the Dynamo settings a captured compilation needs."""

from __future__ import annotations

import logging
import threading
import warnings
import weakref
from collections.abc import Callable
from inspect import getattr_static
from typing import TYPE_CHECKING, Any, Protocol

from torch.nn.parallel import DistributedDataParallel

from fxfuse._torch import (
    InstructionTranslator,
    OutputGraph,
    compile_callbacks,
    dynamo_config,
    dynamo_guards,
    dynamo_metrics,
    dynamo_tracer,
    shape_config,
)
from fxfuse.capture import (
    absent_modules,
    absent_values,
    fact_keys,
    kept_facts,
    known_functions,
    known_types,
    plain_comparisons,
    plain_operations,
    plain_trees,
    plain_views,
    quick_settings,
    sizes_once,
    unread_logs,
)
from fxfuse.capture.adapted_weights import make_traceable
from fxfuse.capture.equal_sizes import equal_is_same, equal_is_same_in_head
from fxfuse.capture.expected import StackDeclined, changed_sentence
from fxfuse.capture.kind import Kind

if TYPE_CHECKING:
    import torch

GraphCompiler = Callable[..., Callable]

# What torch.compile has no argument for. Numbers such as eps are constants of the graph, also when sizes are
# symbolic; hooks of submodules are guarded, or one that is added later would never fire. Sizes that happen to be equal are
# not the same size: else a sequence as long as the model is wide would be a constant, as the width is (equal_sizes.py says which are).
# Numbers on a module that FSDP shards (its head size) are constants as on any other, with guards. Guards of parameters and submodules
# are not skipped because the dictionaries that hold them are unchanged (torch 2.11 does so): one that is thawed, or whose class is
# replaced, would go unnoticed.
# What is found out for others takes a tenth of a first step and is left out: how long guards take, for a log, behind an emptied cache;
# in which function a line of code lies, for a log, by a tokenizer that reads whole files; what each parameter of a model is called,
# for an exporter; all settings of Dynamo and Inductor as texts, for statistics.
SETTINGS: tuple[tuple[Any, str, Any], ...] = (
    (dynamo_config, "specialize_float", True),
    (dynamo_config, "skip_nnmodule_hook_guards", False),
    (dynamo_config, "skip_fsdp_guards", False),
    (dynamo_config, "skip_tensor_guards_with_matching_dict_tags", False),
    (dynamo_config, "use_recursive_dict_tags_for_guards", False),
    (shape_config, "use_duck_shape", False),
    (dynamo_guards, "profile_guard_manager", lambda *guards: 0.0),
    (dynamo_tracer, "get_funcname", lambda *place: None),
    (dynamo_metrics, "_get_dynamo_config_for_logging", lambda: None),
    (dynamo_metrics, "_scrubbed_inductor_config_for_logging", lambda: None),
    (OutputGraph, "add_fqn_info_for_inlined_modules", lambda *module: None),
    *absent_modules.SETTINGS,
    *absent_values.SETTINGS,
    *fact_keys.SETTINGS,
    *kept_facts.SETTINGS,
    *known_functions.SETTINGS,
    *known_types.SETTINGS,
    *plain_comparisons.SETTINGS,
    *plain_operations.SETTINGS,
    *plain_trees.SETTINGS,
    *plain_views.SETTINGS,
    *quick_settings.SETTINGS,
    *sizes_once.SETTINGS,
    *unread_logs.SETTINGS,
)
# What follows a compilation, until the captured call ends: a collection of garbage, and the look through all installed packages for
# backends, among which this one would not be found, as it is no function that anybody registered.
AFTERWARDS = (("run_gc_after_compile", False), ("invalidate_compile_context_weakrefs", False))


class Captured(Protocol):
    """What is running: a module, and somebody to tell when Dynamo begins to trace it, and when it gives up on it."""

    module: torch.nn.Module
    kind: Kind

    def over_limit(self) -> None: ...

    def before_compiling(self) -> None: ...


class _Current(threading.local):
    """The captured calls on this thread, outermost first, and whether what each returns is read by nobody."""

    def __init__(self) -> None:
        self.calls: list[Captured] = []
        self.unread: list[bool] = []
        self.given: list[tuple[tuple, dict[str, Any]]] = []
        self.optimize_ddp: list[Any] = []  # the user's setting, where ours holds for the length of the call, or None


_current = _Current()
_users_settings: list[tuple[Any, str, Any]] = []
_changing: weakref.WeakSet[type] = weakref.WeakSet()
_afterwards: list[tuple[str, Any]] = []
_users_warnings: list[warnings.catch_warnings] = []


def current_module() -> torch.nn.Module | None:
    """The captured module whose graph is being compiled or run on this thread, or None outside of one."""
    return _current.calls[-1].module if _current.calls else None


def current_role() -> str:
    """What that module is in the capture: "block", "leaf", "head", "stack", "whole", "part"; "" outside."""
    return _current.calls[-1].kind.role if _current.calls else ""


def current_call() -> Captured | None:
    """The captured call being compiled or run on this thread."""
    return _current.calls[-1] if _current.calls else None


def enter(call: Captured, unread: bool = False, args: tuple = (), kwargs: dict[str, Any] | None = None) -> None:
    """A captured call begins, with these arguments. ``unread``: nobody will read what it returns (see tail_calls.py)."""
    if _compile_starts not in compile_callbacks.start_callbacks:  # torch.compiler.reset() forgets them
        compile_callbacks.register_start_callback(_compile_starts)
        compile_callbacks.register_end_callback(_compile_ends)
    _current.calls.append(call)
    _current.unread.append(unread)
    _current.given.append((args, kwargs or {}))
    _current.optimize_ddp.append(_keep_whole_under_ddp())


def leave() -> None:
    """The captured call ends."""
    _current.calls.pop()
    _current.unread.pop()
    _current.given.pop()
    before = _current.optimize_ddp.pop()
    if before is not None:
        dynamo_config.optimize_ddp = before
    while _afterwards:
        setattr(dynamo_config, *_afterwards.pop())


def _keep_whole_under_ddp() -> Any:
    """Keep Dynamo from cutting graphs at the bounds of DDP's buckets, through the middle of sites; returns the user's setting.

    Blocks are graphs of their own, whose gradients leave as each backward ends: that overlaps with the reduction already. Dynamo
    reads this before it tells anybody that it compiles, so it is set for every call inside a DDP forward, and for no other.
    """
    if DistributedDataParallel._active_ddp_module is None:
        return None
    before = dynamo_config.optimize_ddp
    dynamo_config.optimize_ddp = False
    return before


def outputs_are_unread() -> bool:
    """Whether the outputs of the graph that is about to run are read by nobody. True once in a call: it has one graph."""
    if not _current.unread or not _current.unread[-1]:
        return False
    _current.unread[-1] = False
    return True


def leaves_only_its_result() -> bool:
    """Whether the captured call that is being compiled does nothing but return.

    It changes no object that was there before (an attribute that it sets, a list that it fills), hooks no tensor, prints nothing: else
    what the graph computes could be read there. Objects made in the call are reached from its result alone.
    """
    if current_call() is None:
        return False
    trace = InstructionTranslator.current_tx()
    effects = trace.output.side_effects
    return not (_changes_objects() or effects.tensor_hooks or effects.save_for_backward or trace.debug_locals)


def _changes_objects() -> bool:
    """Whether what Dynamo traced changes an object that was there before."""
    effects = InstructionTranslator.current_tx().output.side_effects
    changed = [value for value in effects.id_to_variable.values() if effects.is_modified(value)]
    return not all(type(value.mutation_type).__name__.endswith("New") for value in changed)


def note_changes() -> None:
    """A graph is being compiled: whether its module changes objects is remembered. StackDeclined if the forward around it is traced
    as a whole: that was read as if nothing changed, and has not run yet.
    """
    if not _current.calls or not _changes_objects():
        return
    *around, call = _current.calls
    _changing.add(type(call.module))
    if any(other.kind.role == "stack" for other in around):
        raise StackDeclined(changed_sentence(call.module))


def changes_objects(block: torch.nn.Module) -> bool:
    """Whether a captured module of this class did."""
    return type(block) in _changing


def is_tracing() -> bool:
    """Whether Dynamo traces something on this thread at the moment."""
    try:
        return InstructionTranslator.current_tx() is not None
    except AttributeError:  # nothing was ever traced on it
        return False


def replayed_without(call: Captured | None, what: str) -> None:
    """A checkpoint ran a captured call again, without ``what``."""
    if call is not None:
        call.kind.replayed.setdefault(what, set()).add(id(call.module))


def _compile_starts(_: Any) -> None:
    """Dynamo begins to trace; if it does so for us, it does so under our settings."""
    if not _current.calls or _users_settings:
        return
    _current.unread[-1] = False  # what runs while compiling is not the call's own graph
    make_traceable()
    _current.calls[-1].before_compiling()
    _users_warnings.append(warnings.catch_warnings())
    _users_warnings[0].__enter__()
    # Dynamo looks at .grad of every input; that an activation has none is no news to the user.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    # A backward that cannot be traced is told of in the report, as a sentence; AOTAutograd traces under torch's anomaly mode.
    warnings.filterwarnings("ignore", message="Error detected in")
    # What a model's code asks of its libraries (a version, a device) is cached there; that a trace asks anew is no news either.
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    for config, name, value in (*SETTINGS, *_of_this_call()):
        _users_settings.append((config, name, getattr_static(config, name) if isinstance(config, type) else getattr(config, name)))
        setattr(config, name, value)
    for name, value in () if _afterwards else AFTERWARDS:
        if hasattr(dynamo_config, name):
            _afterwards.append((name, getattr(dynamo_config, name)))
            setattr(dynamo_config, name, value)


def _of_this_call() -> tuple[tuple[Any, str, Any], ...]:
    """Settings that hold for the sizes of the captured call."""
    given = _current.given[-1]
    if current_role() == "block" and equal_is_same(*given):
        return ((shape_config, "use_duck_shape", True),)
    if current_role() == "head" and equal_is_same_in_head(*given, _current.calls[-1].module.parameters()):
        return (shape_config, "use_duck_shape", True), (dynamo_config, "specialize_int", True)
    return ()


def _compile_ends(_: Any) -> None:
    """The user's settings come back."""
    for config, name, value in reversed(_users_settings):
        setattr(config, name, value)
    _users_settings.clear()
    if _users_warnings:
        _users_warnings.pop().__exit__(None, None, None)


class _LimitWatcher(logging.Filter):
    """Turns Dynamo's log line about its recompile limit, easily missed, into an error of our report."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not _current.calls or not str(record.msg).startswith("torch._dynamo hit config."):
            return True
        _current.calls[-1].over_limit()
        return False


def watch_recompile_limit() -> None:
    """Have ``over_limit`` told when a captured module reaches Dynamo's recompile limit. Idempotent."""
    logger = logging.getLogger("torch._dynamo.convert_frame")
    if not any(isinstance(old, _LimitWatcher) for old in logger.filters):
        logger.addFilter(_LimitWatcher())
