"""One recorded call: the inputs whose addresses it has, those that are copied in, and its outputs."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from .capture import Run
from .passed import Passed
from .pool import Holding, Pool


class Unrecordable(Exception):
    """A call that ran, and cannot be recorded: the message says why."""


class Recording:
    """``run`` on inputs of one layout.

    fixed:     positions of inputs that are read where they lie (weights; what another recording owns); all other tensors are copied
    fresh:     positions of outputs that the caller gets copies of: they outlive a step (gradients of weights)
    kept:      positions of outputs that turned out to outlive it; what a recording finds of them is added
    returned:  how many outputs, the first ones, go to callers (None: all); the others are saved for the backward
    source:    whose call this is; what a backward looks for among the owners of what it reads
    weights:   of a forward, positions of inputs that last from step to step
    followers: of a forward, what is known of its backward, by size
    """

    def __init__(self, pool: Pool, run: Run, arguments: list, fixed: Collection[int], *, fresh: Collection[int] = (),
                 kept: set[int] | None = None, returned: int | None = None, source: object = None,
                 weights: Collection[int] = ()) -> None:
        self.pool, self.source, self.weights = pool, source, weights
        self.followers: dict[tuple[int, ...], Any] = {}
        self.number = pool.number()
        self.addresses = [(i, arguments[i].data_ptr()) for i in fixed]
        self.copied = [(i, _same_layout(a)) for i, a in enumerate(arguments) if isinstance(a, Tensor) and i not in set(fixed)]
        inputs = list(arguments)
        for i, buffer in self.copied:
            inputs[i] = buffer
        outputs, self._replay = pool.capture(run, inputs)
        self._own: list[Tensor] = []
        self._own_at: list[tuple[int, int]] = []
        self._passed_at: list[tuple[int, Passed]] = []
        self.returned = len(outputs) if returned is None else returned
        self._constants: list[Any] = [None if isinstance(output, Tensor) else output for output in outputs]
        self._sort(outputs, {arguments[i].untyped_storage().data_ptr(): i for i in fixed})
        del outputs  # bases of views would count as somebody who holds the memory
        own = {position for position, _ in self._own_at}
        self._kept = set() if kept is None else kept
        self._fresh = [i for i in {*fresh, *self._kept} if i in own]
        buffers = [buffer for _, buffer in self.copied]
        self.saved = len({which for position, which in self._own_at if position >= self.returned})
        self.bytes = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in [*self._own, *buffers]}.values())
        self.holding = Holding([*self._own, *buffers])
        pool.own(self, self._own)

    def _sort(self, outputs: list, given: dict[int, int]) -> None:
        """Outputs are numbers, in the memory of inputs that are not copied (``given``: their positions by address), or our own."""
        once: dict[int, int] = {}
        for position, output in enumerate(outputs):
            if not isinstance(output, Tensor):
                continue
            if not self.pool.capture.owns(output):
                raise Unrecordable(f"it returns a tensor on {output.device.type}")
            source = given.get(output.untyped_storage().data_ptr())
            if source is not None:
                self._passed_at.append((position, Passed(source, output.shape, output.stride(), output.storage_offset())))
                continue
            if id(output) not in once:
                once[id(output)] = len(self._own)
                self._own.append(output.detach())
            self._own_at.append((position, once[id(output)]))

    def fits(self, arguments: list) -> bool:
        """Do these inputs lie where the recording reads, or have the layout of what is copied."""
        return all(arguments[i].data_ptr() == address for i, address in self.addresses) and all(
            arguments[i].shape == buffer.shape and arguments[i].stride() == buffer.stride() for i, buffer in self.copied
        )

    def run(self, arguments: list) -> list:
        """The outputs for these inputs; takes and empties the list, as compiled graphs do."""
        if self.copied:
            torch._foreach_copy_([_each_once(b) for _, b in self.copied], [_each_once(arguments[i]) for i, _ in self.copied])
        self._replay()
        results = self._given_out(arguments)
        arguments.clear()
        self.pool.handed_out(self)
        return results

    def copy_what_is_kept(self) -> None:
        """Where only outputs are held of what was handed out, callers keep them: they get copies from now on."""
        held = self.holding.held()
        storages = [(position, self._own[which].untyped_storage()._cdata) for position, which in self._own_at]
        kept = {position for position, storage in storages if position < self.returned and storage in held}
        if held == {storage for position, storage in storages if position in kept}:
            self._kept.update(kept)
            self._fresh = [*{*self._fresh, *kept}]

    def _given_out(self, arguments: list) -> list:
        """New tensors over what is owned; one for outputs that are one tensor."""
        results = list(self._constants)
        aliases = [tensor.detach() for tensor in self._own]
        for position, which in self._own_at:
            results[position] = aliases[which]
        for position, passed in self._passed_at:
            results[position] = passed.of(arguments[passed.position])
        if self._fresh:
            copies = [torch.empty_like(results[i]) for i in self._fresh]
            torch._foreach_copy_(copies, [results[i] for i in self._fresh])
            for position, copy in zip(self._fresh, copies, strict=True):
                results[position] = copy
        return results


def _same_layout(tensor: Tensor) -> Tensor:
    """New memory of the layout of a tensor. The recording is run on its values right away, so they are not copied here."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def _each_once(tensor: Tensor) -> Tensor:
    """A view that has each element of memory once: expanded dimensions are cut to one."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor
