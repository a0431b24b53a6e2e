"""Which module a graph is compiled or run for, and the Dynamo settings a captured compilation needs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from fxfuse._torch import dynamo_config

if TYPE_CHECKING:
    import torch

GraphCompiler = Callable[..., Callable]


class Captured(Protocol):
    """What is running: a module, and somebody to tell when Dynamo gives up on it."""

    module: torch.nn.Module

    def over_limit(self) -> None: ...


class _Current(threading.local):
    """The captured calls on this thread, outermost first, and the settings to put back after them."""

    def __init__(self) -> None:
        self.calls: list[Captured] = []
        self.settings: dict[str, Any] = {}


_current = _Current()


def current_module() -> torch.nn.Module | None:
    """The captured module whose graph is being compiled or run on this thread, or None outside of one."""
    return _current.calls[-1].module if _current.calls else None


def enter(call: Captured) -> None:
    """A captured call begins."""
    _current.calls.append(call)


def leave() -> None:
    """The captured call ends; settings that its compilations changed go back to what they were."""
    _current.calls.pop()
    if _current.settings:
        for name, value in _current.settings.items():
            setattr(dynamo_config, name, value)
        _current.settings.clear()


@dataclass(frozen=True)
class CapturedBackend:
    """The backend as Dynamo sees it; equal backends give equal ones, so models of a class share graphs.

    Dynamo calls a backend between tracing and guarding. That is the moment to ask for guards on the hooks of
    submodules, without which a hook added later would never fire; ``leave`` withdraws the request.
    """

    inner: GraphCompiler

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable:
        if _current.calls and not _current.settings:
            _current.settings["skip_nnmodule_hook_guards"] = dynamo_config.skip_nnmodule_hook_guards
            dynamo_config.skip_nnmodule_hook_guards = False
        return self.inner(gm, example_inputs)


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
