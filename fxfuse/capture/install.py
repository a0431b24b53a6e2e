"""Putting dispatchers into a model's compile slots, and taking them out again.

Everything an installation knows hangs on its dispatchers. The model itself gets two marks: the slots, which
copies and pickles leave behind, and on each backbone an instance ``forward`` that keeps it out of the head's
trace, which copies keep (bound to the copy) and which tells a copy from a fresh model.
"""

from __future__ import annotations

import logging
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import nn

from fxfuse._torch import dynamo_config
from fxfuse.capture.context import GraphCompiler, watch_recompile_limit
from fxfuse.capture.declines import reason_to_decline, reason_to_decline_all
from fxfuse.capture.dispatcher import (
    LIMIT_IS_ARGUMENT,
    RECOMPILE_LIMIT,
    Dispatcher,
    EagerDispatcher,
    HeadDispatcher,
    WholeDispatcher,
    compile_forward,
)
from fxfuse.capture.find import Found, find, is_norm_like, kind_of, parts_of, without_adapter
from fxfuse.capture.governor import Governor, release
from fxfuse.capture.head_unit import gathered_apart
from fxfuse.capture.kind import Kind, broken_sentences, limit_sentence, replayed_sentences
from fxfuse.capture.marks import is_marked, keep_out, make_opaque, unmark
from fxfuse.capture.rooms import Rooms, give_rooms_back
from fxfuse.capture.stack_dispatcher import StackDispatcher
from fxfuse.memory.budget import Budget
from fxfuse.memory.plan import LEAST
from fxfuse.sdpa.layouts import sentences as sdpa_sentences

logger = logging.getLogger("fxfuse")
MUCH = 32  # of what a budget has left, one part may go to room beside weights
_lock = threading.RLock()


class Installation:
    """What was installed in one model, and what came of it."""

    def __init__(self, model: nn.Module, backend: GraphCompiler, strict: bool = False, budget: Budget | None = None) -> None:
        self.model = weakref.ref(model)
        self.backend = backend
        self.strict = strict
        self.budget = budget
        self.governor: Governor | None = None
        self.kinds: dict[tuple, Kind] = {}
        self.declined: dict[str, str] = {}
        self.head = ""  # why there is no head, or nothing
        self.rooms = Rooms(backend, self._has_memory)
        self._with_rooms: set[int] = set()  # kinds
        self._compiled: dict[tuple[type, str], Callable] = {}
        self._modules: dict[int, list[nn.Module]] = {}

    def compiled_forward(self, cls: type, plan: str = "") -> Callable:
        """The captured forward of ``cls``, made once; under a memory plan of its own, if one is given."""
        if (cls, plan) not in self._compiled:
            backend = replace(self.backend, plan=plan) if plan else self.backend  # type: ignore[type-var]
            self._compiled[cls, plan] = compile_forward(cls, backend)
        return self._compiled[cls, plan]

    def covers(self, model: nn.Module) -> bool:
        """Whether this is the installation of ``model`` itself, seen through an adapter wrapper or not."""
        return self.model() in (model, without_adapter(model))

    def kind(self, module: nn.Module, role: str) -> Kind:
        """The kind that ``module`` is one more of."""
        kind = self.kinds.setdefault((role, kind_of(module)), Kind(type(module).__name__, role))
        kind.modules += 1
        self._modules.setdefault(id(kind), []).append(module)
        return kind

    def dispatch(self, path: str, module: nn.Module, role: str) -> bool:
        """Install a dispatcher in ``module``, unless it must be left alone."""
        reason = reason_to_decline(module, role)
        if reason:
            self.declined[path] = reason
            return False
        kind = self.kind(module, role)
        make = {"head": HeadDispatcher, "whole": WholeDispatcher}.get(role, Dispatcher)
        module._compiled_call_impl = make(module, kind, self)
        return True

    def descend(self, kind: Kind, only: nn.Module | None = None) -> None:
        """Capture the parts of a module that cannot be captured whole, or of every module of its kind."""
        for module in self._modules.get(id(kind), []) if only is None else [only]:
            for part in parts_of(module):
                if not isinstance(part._compiled_call_impl, Dispatcher):
                    self.dispatch(type(part).__name__, part, "leaf" if is_norm_like(part) else "part")

    def enter_rooms(self, module: nn.Module, kind: Kind) -> None:
        """Before a captured call: its adapted weights lie as its graph has them."""
        if id(kind) not in self._with_rooms:
            self._with_rooms.add(id(kind))
            self.make_rooms(kind)
        self.rooms.enter(module)

    def make_rooms(self, kind: Kind) -> None:
        """Before a graph is made, or found, for the modules of a kind: adapted weights get room."""
        model = self.model()
        if model is not None and kind.role in ("block", "part", "whole"):
            self.rooms.prepare(self._modules.get(id(kind), []), model)

    def _has_memory(self, more: int) -> bool:
        """Whether a budget, if there is one, has much more left than so many bytes, which no plan knows of before the first step."""
        governor = self.governor
        if governor is None or governor.device.type != "cuda":
            return True
        allocated = torch.cuda.memory_allocated(governor.device)
        return governor.budget.resolve(governor.device, allocated) - allocated > MUCH * more

    def notes(self) -> list[str]:
        """What a reader of the report should know about the capture, sentence by sentence."""
        lines = [] if self.governor is None else list(self.governor.notes)
        lines += [f"{path or 'the model'} is left as it is: {why}" for path, why in _grouped(self.declined)]
        if self.head:
            lines.append(self.head)
        lines += self.rooms.sentences() + sdpa_sentences()
        heads = [head for kind in self.kinds.values() if kind.role == "head" for head in self._modules[id(kind)]]
        lines += [sentence for sentence in map(gathered_apart, heads) if sentence]
        for kind in self.kinds.values():
            lines += broken_sentences(kind) + replayed_sentences(kind)
            lines += [
                f"{kind.name}: {calls} calls ran eager, because {why}" for why, calls in kind.eager.items()
            ]
        return lines

    def errors(self) -> list[str]:
        """What went wrong at run time."""
        lines = [] if self.governor is None else list(self.governor.errors)
        return lines + [limit_sentence(kind) for kind in self.kinds.values() if kind.limit]


def install(model: nn.Module, backend: GraphCompiler, strict: bool = False, budget: Budget | None = None) -> Installation:
    """Install capture in ``model``. ``backend`` is compared by value: equal backends share graphs.

    budget: of memory; the blocks then get plans of their own as the model runs.
    """
    with _lock:
        uninstall(model)
        installation = Installation(model, backend, strict, budget)
        watch_recompile_limit()
        _prepare_dynamo()
        reason = reason_to_decline_all(model)
        if reason:
            installation.declined[""] = reason
            model._compiled_call_impl = EagerDispatcher(model, installation)
            return installation
        found = find(model)
        for path, block in found.blocks.items():
            installation.dispatch(path, block, "block")
        for path, leaf in found.leaves.items():
            installation.dispatch(path, leaf, "leaf")
        _install_top(model, found, installation)
        if budget is not None:
            installation.governor = _governor(model, found, budget)
        return installation


def _governor(model: nn.Module, found: Found, budget: Budget) -> Governor:
    """What keeps the budget: told of each forward by the first module that calls blocks."""
    modules = found.blocks if found.blocks else {"": model}
    blocks = [(path, slot) for path, block in modules.items() if isinstance(slot := block._compiled_call_impl, Dispatcher)]
    top = without_adapter(model)
    entries = list(found.backbones.values()) or [top if isinstance(top._compiled_call_impl, Dispatcher) else model]
    for _, dispatcher in blocks:
        dispatcher.follow(LEAST)
    return Governor(model, budget, blocks, entries)


def _install_top(model: nn.Module, found: Found, installation: Installation) -> None:
    top = without_adapter(model)
    if not found.blocks and model._compiled_call_impl is None:
        installation.dispatch("", model, "whole")
    elif found.head is not None and _keep_out(found.backbones, installation):
        installation.dispatch("the top-level forward", top, "head")
    elif found.stack is not None:
        _install_stack(top, found, installation)
    if model._compiled_call_impl is None:
        model._compiled_call_impl = EagerDispatcher(model, installation)


def _install_stack(top: nn.Module, found: Found, installation: Installation) -> None:
    """Capture a forward that calls its blocks itself, around them."""
    blocks = list(found.blocks.values())
    reason = reason_to_decline(top)
    if reason or any("forward" in vars(block) for block in blocks):
        return
    for position, block in enumerate(blocks):
        make_opaque(block, position)
    kind = installation.kind(top, "stack")
    top._compiled_call_impl = StackDispatcher(top, kind, installation, blocks)


def _keep_out(backbones: dict[str, nn.Module], installation: Installation) -> bool:
    """Keep the backbones out of the head's trace; False (and a sentence) where one is taken already."""
    for path, backbone in backbones.items():
        if "forward" in vars(backbone):
            installation.head = (
                f"The head (output projection and loss) is not captured: forward of {path} was replaced on the "
                "instance; call fxfuse.optimize before whatever does that"
            )
            return False
    for backbone in backbones.values():
        keep_out(backbone)
    return True


def uninstall(model: nn.Module) -> bool:
    """Undo ``install``, exactly; also clears what a copy of an installed model has left."""
    with _lock:
        release(model)
        touched = give_rooms_back(model)
        for module in model.modules():
            if isinstance(vars(module).get("_compiled_call_impl"), Dispatcher):
                del module.__dict__["_compiled_call_impl"]
                touched = True
            touched |= unmark(module)
        return touched


def find_installation(model: nn.Module) -> Installation | None:
    """The installation in ``model`` or in the part of it that was optimized (before an adapter wrapped it)."""
    return next((dispatcher.installation for dispatcher in _dispatchers(model)), None)


def is_copy(model: nn.Module) -> bool:
    """Whether ``model`` was copied or loaded from an optimized model: marks of one, and nothing installed."""
    return find_installation(model) is None and any(is_marked(module) for module in model.modules())


def _dispatchers(model: nn.Module) -> Iterator[Dispatcher]:
    for module in model.modules():
        slot = vars(module).get("_compiled_call_impl")
        if isinstance(slot, Dispatcher):
            yield slot


def _prepare_dynamo() -> None:
    """Settings that torch.compile has no argument for."""
    if dynamo_config.recompile_limit < RECOMPILE_LIMIT and not LIMIT_IS_ARGUMENT:
        dynamo_config.recompile_limit = RECOMPILE_LIMIT
    library = sys.modules.get("transformers.utils.logging")
    # A warning that is shown once is no reason to cut a loss in two. (Before 2.13, Dynamo's metrics cannot print such a setting.)
    if library is not None and torch.__version__ >= (2, 13):
        dynamo_config.ignore_logging_functions.add(library.warning_once)


def _grouped(declined: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Equal sentences under one path: layers.0, layers.1 ... -> layers.*."""
    from fxfuse.reporting.records import collapse

    yield from dict.fromkeys((collapse(path), why) for path, why in declined.items())
