"""One recorded call: the inputs whose addresses it has, those that are copied in, and its outputs."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .capture import Run
from .pool import Holding, Pool


class Unrecordable(Exception):
    """A call that ran, and cannot be recorded: the message says why."""


class Passed(NamedTuple):
    """An output that lies in the memory of an input that is not copied: made of each call's own input."""

    position: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def of(self, given: Tensor) -> Tensor:
        """This output, of a call with ``given`` at that position."""
        if (given.shape, given.stride(), given.storage_offset()) == (self.size, self.stride, self.offset):
            return given
        return given.as_strided(self.size, self.stride, self.offset)


class Recording:
    """``run`` on inputs of one layout.

    fixed: positions of inputs that are read where they lie (weights; what another recording owns); all other tensors are copied.
    fresh:     positions of outputs that the caller gets copies of: they outlive a step (gradients of weights)
    source:    whose call this is; what a backward looks for among the owners of what it reads
    weights:   of a forward, positions of inputs that last from step to step
    followers: of a forward, what is known of its backward, by size
    """

    def __init__(self, pool: Pool, run: Run, arguments: list, fixed: Collection[int], *, fresh: Collection[int] = (),
                 source: object = None, weights: Collection[int] = ()) -> None:
        self.pool, self.source, self.weights = pool, source, weights
        self.followers: dict[tuple[int, ...], Any] = {}
        self.number = pool.number()
        self.addresses = [(i, arguments[i].data_ptr()) for i in fixed]
        self.copied = [(i, _same_layout(a)) for i, a in enumerate(arguments) if isinstance(a, Tensor) and i not in set(fixed)]
        inputs = list(arguments)
        for i, buffer in self.copied:
            inputs[i] = buffer
        outputs, self._replay = pool.capture(run, inputs)
        given = {arguments[i].untyped_storage().data_ptr(): i for i in fixed}
        once = {id(output): self._described(output, given) for output in outputs}
        self._results = [once[id(output)] for output in outputs]
        del once, outputs  # bases of views would count as somebody who holds the memory
        own = [result for result in self._results if isinstance(result, Tensor)]
        self._fresh = [i for i in fresh if i < len(self._results) and isinstance(self._results[i], Tensor)]
        buffers = [buffer for _, buffer in self.copied]
        self.holding = Holding([*own, *buffers])
        self.bytes = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in [*own, *buffers]}.values())
        pool.own(self, own)

    def _described(self, output: object, given: dict[int, int]) -> object:
        if not isinstance(output, Tensor):
            return output
        if not self.pool.capture.owns(output):
            raise Unrecordable(f"it returns a tensor on {output.device.type}")
        position = given.get(output.untyped_storage().data_ptr())
        if position is None:
            return output.detach()
        return Passed(position, output.shape, output.stride(), output.storage_offset())

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

    def _given_out(self, arguments: list) -> list:
        """New tensors over what is owned; one for outputs that are one tensor."""
        aliases: dict[int, Tensor] = {}
        results: list = []
        for result in self._results:
            if isinstance(result, Tensor):
                if id(result) not in aliases:
                    aliases[id(result)] = result.detach()
                results.append(aliases[id(result)])
            else:
                results.append(result.of(arguments[result.position]) if isinstance(result, Passed) else result)
        if self._fresh:
            copies = [torch.empty_like(results[i]) for i in self._fresh]
            torch._foreach_copy_(copies, [results[i] for i in self._fresh])
            for i, copy in zip(self._fresh, copies, strict=True):
                results[i] = copy
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
