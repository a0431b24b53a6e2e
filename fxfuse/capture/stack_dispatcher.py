"""The compile slot of a top-level module whose forward calls its blocks itself: one trace around them (stack.py), or eager."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxfuse.capture.cache import CacheArgument
from fxfuse.capture.context import changes_objects
from fxfuse.capture.dispatcher import CACHE_SENTENCE, Dispatcher, compile_forward, raise_if_strict
from fxfuse.capture.expected import (
    OtherThanAssumed,
    StackDeclined,
    changed_sentence,
    declined_in,
    run_watched,
    undone_if_declined,
)
from fxfuse.capture.find import kind_of, shape_signature
from fxfuse.capture.governor import governed
from fxfuse.capture.kind import Kind, broken_sentences, first_line
from fxfuse.capture.stack import AroundBlocks, call_block, tracing
from fxfuse.output_contract.source import next_forward
from fxfuse.reporting.records import detach

if TYPE_CHECKING:
    from fxfuse.capture.install import Installation

logger = logging.getLogger("fxfuse")


class StackDispatcher(Dispatcher):
    """Decides for a forward around its blocks. What it holds of them is said in expected.py."""

    def __init__(
        self, module: nn.Module, kind: Kind, installation: Installation, blocks: list[nn.Module]
    ) -> None:
        super().__init__(module, kind, installation)
        self.compiled = compile_forward(type(module), AroundBlocks(installation.backend))
        self.blocks, self.kinds = blocks, [(kind_of(block), shape_signature(block)) for block in blocks]
        self.other: set[tuple] = set()
        self.imagined: dict[Any, Any] = {}
        self.seen: dict[Any, Any] = {}
        self.again = False
        torch.compiler.allow_in_graph(call_block)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        next_forward(self.module)
        return governed(self.module, super().__call__, args, kwargs)

    def run_block(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A block's forward through its slot; its hooks, if any, are in this module's graph."""
        dispatcher = block._compiled_call_impl
        if isinstance(dispatcher, Dispatcher) and dispatcher.kind.captured and not dispatcher.kind.broken_modules:
            return dispatcher.run(*args, **kwargs)
        forward = dispatcher.run if isinstance(dispatcher, Dispatcher) else MethodType(type(block).forward, block)
        return run_watched(block, forward, args, kwargs)

    def _try(self, args: tuple, kwargs: dict[str, Any], with_cache: bool, unread: bool = False) -> tuple[bool, Any]:
        changing = next(filter(changes_objects, self.blocks), None)
        if changing is not None:
            self._give_up(StackDeclined(changed_sentence(changing)), with_cache)
            return False, None
        while True:  # once more for each kind of block that gives something else than it is given, at most
            self.again = False
            done, out = self._attempt(args, kwargs, with_cache)
            if not done and not self.kind.captured:
                detach(self.module)  # what was compiled around the blocks will not run
            if not self.again:
                return done, out

    def _attempt(self, args: tuple, kwargs: dict[str, Any], with_cache: bool) -> tuple[bool, Any]:
        undone = nullcontext() if self.kind.captured else undone_if_declined(self.module)
        try:
            with tracing(f"{len(self.other)} others"), undone:
                return super()._try(args, kwargs, with_cache)  # (several graphs run in one call: each output may be read)
        except OtherThanAssumed:
            self.again = True
        except AssertionError:  # torch 2.11's, of a pair taken apart that was taken to be none; or the model's own
            if not self._drops_assumptions():
                raise
        except StackDeclined as error:  # found out while running; the call is repeated in eager
            self._give_up(error, with_cache)
        finally:
            self.imagined.clear()
            self.seen.clear()
        return False, None

    def _drops_assumptions(self) -> bool:
        """Imagine every kind of block from now on, and trace again; False where that was so already."""
        if self.other.issuperset(self.kinds):
            return False
        self.other.update(self.kinds)
        self.again = True
        return True

    def _run_with_cache(self, found: CacheArgument, args: tuple, kwargs: dict[str, Any]) -> Any:
        self.kind.eager[CACHE_SENTENCE] += 1
        return self.forward(self.module, *args, **kwargs)

    def _give_up(self, error: Exception, with_cache: bool) -> None:
        """Its blocks and norms are captured anyway. (What cannot be traced may be what was assumed of a block: a pair taken apart.)"""
        declined = declined_in(error)
        if declined is None and self._drops_assumptions():
            return
        if declined is None:
            raise_if_strict(error, self.installation.strict)
        self.kind.broken[with_cache] = first_line(error) if declined is None else str(declined)
        logger.warning("%s", broken_sentences(self.kind)[-1])
