"""Which calls of a block's graphs are recorded, and which are replayed.

The first call of a graph at a module and a size runs as ever: kernels are compiled and tuned in it. The next is recorded and replayed
from then on. What may change between the two is copied in from then on; what has stayed where it was (weights) is read there, and its
address is looked at in every call. A backward is recorded once it has run on what a recorded forward saved.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._torch import graph_task_id, top_saved_tensors_hooks
from ..capture.context import current_module
from ..reporting.records import GraphRecord
from .checkpoints import is_first_run
from .gauge import Gauge
from .places import Place, Seen, forget, forget_oldest, places_of
from .pool import Pool, device_index, forget_unheld, pool_of
from .recording import Recording, Unrecordable

if TYPE_CHECKING:
    from .checkpoint_recorder import CheckpointRecorder

logger = logging.getLogger("fxfuse")
Compiled = Callable[[list], Any]
Options = Callable[[list[int]], dict[str, Any]]  # of a Recording, given the positions of inputs that last from step to step

SIZES = 4  # recordings of one graph at one module: each owns what it saves

OVER_SIZES = f"there are recordings for {SIZES} sizes already; bring lengths to a few values to have more of them replayed"
NO_ROOM = "what recordings of one more size keep might not fit into what is free of the device's memory"
HOOKED = "what it saves is not kept where it is (a checkpoint, offloading), and a recording would keep it all"
ELSEWHERE = "its inputs did not lie where they lay when it was recorded"
IN_USE = "what it, or a block recorded after it, had returned was still in use"
UNSTEADY = "its inputs lay elsewhere, or what it returns was in use, each time it had been recorded"


@dataclass
class Tally:
    """What became of the calls of one graph. A line of the report."""

    graph: str
    recorded: int = 0
    replayed: int = 0
    plain: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        line = f"CUDA graphs of {self.graph}: {self.recorded} recorded, {self.replayed} replays"
        others = "; ".join(f"{count} calls ran kernel by kernel, because {why}" for why, count in self.plain.items())
        return f"{line}; {others}" if others else line


class Pair:
    """What the forward and the backward of one graph share: the account of their calls, and the pool, once a device is known.

    gauge:    of a graph that is recorded only if its calls wait for the host
    returned: how many outputs of the forward are not saved for the backward
    checkpoint: what records the graph where a checkpoint runs it
    """

    def __init__(self, record: GraphRecord, gauge: Gauge | None = None) -> None:
        self.tally = Tally(record.module or "a graph")
        record.reads.append(self.tally)
        self.gauge = gauge
        self.returned = 0
        self.checkpoint: CheckpointRecorder | None = None
        self.pool: Pool | None = None

    def pool_for(self, arguments: list) -> Pool | None:
        """The pool of the device that a call is on."""
        if self.pool is None:
            index = device_index(arguments)
            self.pool = None if index is None else pool_of(index)
        return self.pool


def recorded(run: Compiled, pair: Pair, direction: str, unfit: str = "") -> Compiled:
    """A block's compiled "forward" or "backward", recorded and replayed; ``unfit``: why it cannot be."""
    recorder = Recorder(run, pair, unfit)
    function = recorder.forward if direction == "forward" else recorder.backward

    def call(arguments: list) -> Any:
        return function(arguments)

    call._boxed_call = True  # type: ignore[attr-defined]
    return call


def release(model: nn.Module) -> None:
    """Forget what was recorded for the modules of ``model``; its memory is free once nobody refers to it."""
    for module in model.modules():
        forget(module)
    forget_unheld()


class Recorder:
    """One compiled graph and its recordings."""

    def __init__(self, run: Compiled, pair: Pair, unfit: str) -> None:
        self.run, self.pair = run, pair
        self.stopped = unfit  # why nothing is recorded, or nothing more
        self.numbers: list[int] | None = None
        self.anchor: int | None = None  # the position of a backward's input that its own forward owns

    def forward(self, arguments: list) -> Any:
        """Outputs and saved values."""
        module, pool = current_module(), self.pair.pool_for(arguments)
        if module is None or torch.is_grad_enabled():
            return self.run(arguments)
        if self.stopped or pool is None:
            return self.plainly(arguments, self.stopped or "it is not on a GPU")
        checkpoint = self.pair.checkpoint if is_first_run() else None
        if checkpoint is None and (top_saved_tensors_hooks(True) is not None or graph_task_id() != -1):
            return self.plainly(arguments, HOOKED)
        gauge = self.pair.gauge
        if gauge is not None and gauge.ask() is False:
            return self.plainly(arguments, gauge.why_not)
        if checkpoint is not None and (gauge is None or gauge.worth):
            return checkpoint.first(module, arguments, pool)
        place, why = self.place(module, self.sizes_in(arguments), pool)
        if gauge is not None and not gauge.worth:
            if place is not None:
                place.seen = Seen(arguments)
            return gauge.run(self.run, arguments, pool.capture)
        if place is None:
            return self.plainly(arguments, why)
        return self.at(place, arguments, pool, self._of_a_forward)

    def _of_a_forward(self, lasting: list[int]) -> dict[str, Any]:
        return {"returned": self.pair.returned, "source": self.pair, "weights": lasting}

    def place(self, module: nn.Module, sizes: tuple[int, ...], pool: Pool) -> tuple[Place | None, str]:
        """What is known of a module's calls at this size; or why there is nothing to be known of it."""
        places = places_of(module, self)
        place = places.get(sizes)
        if place is not None and place.recording is not None:
            return place, ""
        recorded = sum(p.recording is not None for p in places.values())
        if recorded >= SIZES:
            return None, OVER_SIZES
        place = places.setdefault(sizes, Place())
        forget_oldest(places)
        return (None, NO_ROOM) if recorded and place.seen is not None and not pool.has_room() else (place, "")

    def backward(self, arguments: list) -> Any:
        """Gradients, in the order of the forward's inputs."""
        pool = self.pair.pool_for(arguments)
        put_off = None if pool is None else pool.waiting.find(arguments)
        if put_off is not None:
            assert pool is not None
            assert self.pair.checkpoint is not None
            return self.pair.checkpoint.backward(put_off, arguments, pool)
        forward = None if pool is None or torch.is_grad_enabled() else self._forward_of(arguments, pool)
        if pool is None or forward is None:
            return self.run(arguments)  # its forward was not replayed either
        place = forward.followers.setdefault(self.sizes_in(arguments), Place())
        return self.at(place, arguments, pool, lambda lasting: {"fresh": forward.weights})

    def sizes_in(self, arguments: list) -> tuple[int, ...]:
        """The numbers among the inputs, which are always at the same positions: they determine every shape in the graph."""
        if self.numbers is None:
            self.numbers = [i for i, a in enumerate(arguments) if not isinstance(a, Tensor)]
        return tuple(arguments[i] for i in self.numbers)

    def _forward_of(self, arguments: list, pool: Pool) -> Recording | None:
        """The recording of the forward that owns what this backward reads.

        A forward may have read what another one of this graph owns, and saved that too; that other was recorded before it.
        """
        if self.anchor is not None:
            owner = pool.owner(arguments[self.anchor])
            return owner if owner is not None and owner.source is self.pair else None
        owners = {i: owner for i, a in enumerate(arguments) if isinstance(a, Tensor) and (owner := pool.owner(a)) is not None}
        ours = {i: owner for i, owner in owners.items() if owner.source is self.pair}
        if not ours:
            return None
        anchor = max(ours, key=lambda i: ours[i].number)
        if sum(owner is ours[anchor] for owner in ours.values()) < ours[anchor].saved:
            return None  # it comes after one that was recorded, and was not itself
        self.anchor = anchor
        return ours[anchor]

    def at(self, place: Place, arguments: list, pool: Pool, options: Options) -> Any:
        """The outputs of a call: replayed, or recorded and replayed, or run."""
        why = self.stopped or pool.capture.why_not_now() or (UNSTEADY if place.given_up else "")
        if why:
            return self.plainly(arguments, why)
        recording = place.recording
        if recording is None:
            if place.seen is None:
                place.seen = Seen(arguments)
                return self.run(arguments)
            recording = self._record(place, arguments, pool, options)
            if recording is None:
                return self.plainly(arguments, self.stopped)
        elif not recording.fits(arguments):
            place.missed()
            return self.plainly(arguments, ELSEWHERE)
        elif (holder := pool.in_the_way(recording)) is not None:
            holder.copy_what_is_kept()
            place.missed()
            return self.plainly(arguments, IN_USE)
        place.misses = 0
        self.pair.tally.replayed += 1
        return recording.run(arguments)

    def _record(self, place: Place, arguments: list, pool: Pool, options: Options) -> Recording | None:
        """A recording of this call. None where that cannot be done; nothing is recorded of this graph then from now on."""
        assert place.seen is not None
        owned = [i for i, a in enumerate(arguments) if isinstance(a, Tensor) and pool.owner(a) is not None]
        lasting = [i for i in place.seen.lasted(arguments) if i not in owned]
        fixed = [*owned, *lasting]
        place.trials += 1
        try:
            recording = Recording(pool, self.run, arguments, fixed, kept=place.kept, **options(lasting))
        except (Unrecordable, RuntimeError) as error:  # torch's and CUDA's errors are RuntimeErrors
            self.stopped = f"recording failed: {_first_cause(error)}"
            logger.warning("CUDA graphs of %s: %s", self.pair.tally.graph, self.stopped)
            return None
        place.recording, place.seen = recording, None
        self.pair.tally.recorded += 1
        return recording

    def plainly(self, arguments: list, why: str) -> Any:
        self.pair.tally.plain[why] += 1
        return self.run(arguments)


def _first_cause(error: BaseException) -> str:
    """What went wrong first: that a recording could not be ended is the consequence."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error).splitlines() or [type(error).__name__])[0]

