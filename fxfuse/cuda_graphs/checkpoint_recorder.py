"""The recordings of a graph under a checkpoint: its first run, and its second run with the backward (see checkpoints.py)."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..capture.context import current_module
from .checkpoints import Both, Layout, PutOff, is_second_run
from .places import WAITING, Seen
from .pool import Pool
from .recorder import Compiled, Pair, Recorder

REENTRANT = "a checkpoint ran it that is no checkpoint with use_reentrant=False"

Layouts = dict[tuple[int, ...], Layout]


class CheckpointRecorder:
    """forward: the compiled forward; both: its second run and the backward."""

    def __init__(self, pair: Pair, both: Both, forward: Compiled, unfit: str) -> None:
        self.pair, self.both, self.forward = pair, both, forward
        self.outputs = Recorder(self._outputs, pair, unfit)
        self.joint = Recorder(both, pair, unfit)
        self.layouts: WeakKeyDictionary[nn.Module, Layouts] = WeakKeyDictionary()

    def _outputs(self, arguments: list) -> list:
        return list(self.forward(arguments))[: self.pair.returned]

    def first(self, module: nn.Module, arguments: list, pool: Pool) -> list:
        """Outputs, and what is saved: by name only, once it is known what that looks like. The checkpoint drops it at once."""
        sizes = self.outputs.sizes_in(arguments)
        place, why = self.outputs.place(module, sizes, pool)
        layouts = self.layouts.setdefault(module, {})
        given = list(arguments)
        if sizes not in layouts:
            results = list(self.forward(arguments))
            if len(layouts) >= WAITING:
                layouts.clear()
            layouts[sizes] = Layout(given, results)
            if place is not None:
                place.seen = Seen(given)
            return results
        if place is None:
            outputs = self.outputs.plainly(arguments, why)
        else:
            outputs = self.outputs.at(place, arguments, pool, lambda lasting: {})
        return [*outputs, *layouts[sizes].filled(given, self.pair.returned)[0]]

    def second(self, arguments: list) -> list | None:
        """Results without values, whose backward will run both; None where the second run has to be one of its own."""
        module, pool = current_module(), self.pair.pool
        if not is_second_run():
            self.pair.tally.plain[REENTRANT] += 1
            return None
        if module is None or pool is None or torch.is_grad_enabled() or not self.both.is_complete:
            return None
        layout = self.layouts.get(module, {}).get(self.outputs.sizes_in(arguments))
        if layout is None or self.joint.stopped or pool.capture.why_not_now():
            return None
        given = list(arguments)
        results, memories = layout.filled(given)
        pool.waiting.add(memories, PutOff(module, given))
        arguments.clear()
        return results

    def backward(self, run: PutOff, arguments: list, pool: Pool) -> Any:
        """The gradients, after the second run that was put off."""
        together = [*run.arguments, *self.both.arriving(arguments)]
        arguments.clear()
        place, why = self.joint.place(run.module, self.joint.sizes_in(together), pool)
        if place is None:
            return self.joint.plainly(together, why)
        return self.joint.at(place, together, pool, self._gradients_of_weights)

    def _gradients_of_weights(self, lasting: list[int]) -> dict[str, Any]:
        """Gradients come in the order of the forward's inputs."""
        return {"fresh": [i for i in lasting if i < self.both.inputs]}
