"""Blocks under a checkpoint: what it runs again, and the backward that wants it, are one recording.

``torch.utils.checkpoint`` (without reentry) runs a block twice. Of the first run it keeps the outputs and drops what is saved; of the
second, in the backward, it keeps what is saved, for the backward that follows, and drops the outputs. A recording that owned what is
saved would keep for every block what a checkpoint is there to let go. So

    the first run   is recorded without what it saves;
    the second run  is put off: it gives tensors of the right shapes that hold nothing (NaN, one element of memory);
    the backward    that is given those runs both, or replays both as one recording. What is saved lies inside of it, in memory that
                    the recordings of all blocks share.

Whoever else would read what was put off would read NaN.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from .._torch import top_saved_tensors_hooks
from .passed import Passed

# Whether blocks under a checkpoint are recorded at all. Not by default before that has run on a GPU.
RECORDED = False

_CHECKPOINT = "torch.utils.checkpoint"
_FIRST, _SECOND = (f"{hook}.__init__.<locals>.pack_hook" for hook in ("_checkpoint_hook", "_recomputation_hook"))


def is_first_run() -> bool:
    """Is what runs now saved under the hooks of a checkpoint that runs its function for the first time."""
    return _is_packed_by(_FIRST)


def is_second_run() -> bool:
    """Is it saved for the backward that made a checkpoint run its function again."""
    return _is_packed_by(_SECOND)


def _is_packed_by(hook: str) -> bool:
    hooks = top_saved_tensors_hooks(True)
    pack = None if hooks is None else hooks[0]
    return (getattr(pack, "__module__", ""), getattr(pack, "__qualname__", "")) == (_CHECKPOINT, hook)


def is_kept_apart(result: Any) -> bool:
    """Is this result of a forward graph saved where no hook sees it: a checkpoint would not compute it again."""
    return isinstance(result, fx.Node) and bool(result.meta.get("saved_tensor_with_no_vc_check"))


class Nothing(NamedTuple):
    """A tensor whose values nobody has computed."""

    size: torch.Size
    dtype: torch.dtype
    device: torch.device


class Layout:
    """What a forward returns and saves, without its values: numbers, parts of its inputs, and tensors of their own."""

    def __init__(self, given: list, results: list) -> None:
        addresses = {a.untyped_storage().data_ptr(): i for i, a in enumerate(given) if isinstance(a, Tensor)}
        self._parts = [self._part(result, addresses) for result in results]

    @staticmethod
    def _part(result: Any, addresses: dict[int, int]) -> Any:
        if not isinstance(result, Tensor):
            return result
        position = addresses.get(result.untyped_storage().data_ptr())
        if position is None:
            return Nothing(result.shape, result.dtype, result.device)
        return Passed(position, result.shape, result.stride(), result.storage_offset())

    def filled(self, given: list, start: int = 0) -> tuple[list, list[Tensor]]:
        """The results from position ``start`` on for these inputs, and the memory that the tensors without values are in."""
        memories: dict[torch.device, Tensor] = {}
        results: list = []
        for part in self._parts[start:]:
            if isinstance(part, Nothing):
                if part.device not in memories:
                    memories[part.device] = torch.full((16,), 0xFF, dtype=torch.uint8, device=part.device)
                element = memories[part.device].view(part.dtype)[0]
                results.append(element.expand(part.size).detach())
            else:
                results.append(part.of(given[part.position]) if isinstance(part, Passed) else part)
        return results, list(memories.values())


@dataclass(frozen=True)
class PutOff:
    """A second run that was put off: the module it is of and its inputs."""

    module: nn.Module
    arguments: list


class Waiting:
    """Second runs that were put off, by the memory of the tensors that stand for what they save, and while there is such a tensor."""

    def __init__(self) -> None:
        self._runs: dict[int, PutOff] = {}

    def add(self, memories: list[Tensor], run: PutOff) -> None:
        for memory in memories:
            storage = memory.untyped_storage()
            self._runs[storage.data_ptr()] = run
            weakref.finalize(storage, self._runs.pop, storage.data_ptr(), None).atexit = False

    def find(self, arguments: list) -> PutOff | None:
        """The run that computes some of these."""
        if not self._runs:
            return None
        found = (self._runs.get(a.untyped_storage().data_ptr()) for a in arguments if isinstance(a, Tensor))
        return next((run for run in found if run is not None), None)


class Both:
    """The second run and the backward as one callable of the forward's inputs and the gradients that arrive.

    saved_as: names of the forward's results; taken_as: of the backward's inputs. What is saved bears the same name in both.
    """

    def __init__(self, second: Callable[[list], Any], saved_as: list[str], inputs: int) -> None:
        self.second, self.saved_as, self.inputs = second, saved_as, inputs
        self.taken_as: list[str] = []
        self.backward: Callable[[list], Any] | None = None

    def follow_with(self, backward: Callable[[list], Any], taken_as: list[str]) -> None:
        """The backward is compiled."""
        self.backward, self.taken_as = backward, taken_as

    @property
    def is_complete(self) -> bool:
        """Is the backward compiled as well."""
        return self.backward is not None

    def arriving(self, arguments: list) -> list:
        """Of the backward's inputs those that the forward did not save."""
        return [a for a, name in zip(arguments, self.taken_as, strict=True) if name not in self.saved_as]

    def __call__(self, arguments: list) -> Any:
        assert self.backward is not None
        arriving = arguments[self.inputs :]
        del arguments[self.inputs :]
        results = self.second(arguments)
        values = {name: value for name, value in zip(self.saved_as, results, strict=True) if name in self.taken_as}
        del results
        arriving.reverse()
        taken = [values.pop(name) if name in values else arriving.pop() for name in self.taken_as]
        return self.backward(taken)
