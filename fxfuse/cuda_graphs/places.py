"""Where a graph is called: one module's calls at one size. Its recording, and the history that says whether to have one."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from .recording import Recording

# A recording that could not be replayed as often as this in a row is made again, and after so many times no more.
MISSES = 4
TRIALS = 4
WAITING = 16  # sizes that may wait for their second call


class Seen:
    """The tensors of one call. Holds none of them alive."""

    def __init__(self, arguments: list) -> None:
        self._storages = [weakref.ref(a.untyped_storage()) if isinstance(a, Tensor) else None for a in arguments]

    def lasted(self, arguments: list) -> list[int]:
        """Positions at which a later call has a tensor in the same memory, which nobody has let go of in between."""
        return [
            i for i, (a, storage) in enumerate(zip(arguments, self._storages, strict=True))
            if storage is not None and isinstance(a, Tensor) and storage() is a.untyped_storage()
        ]


@dataclass(eq=False)
class Place:
    """A graph at one module and one size.

    kept: positions of outputs that callers keep longer than a step
    """

    seen: Seen | None = None
    recording: Recording | None = None
    misses: int = 0
    trials: int = 0
    kept: set[int] = field(default_factory=set)

    def missed(self) -> None:
        """The recording could not be replayed. Where that goes on, it is made anew from what calls look like now."""
        self.misses += 1
        if self.misses >= MISSES:
            self.recording, self.seen, self.misses = None, None, 0

    @property
    def given_up(self) -> bool:
        """Has it been recorded, in vain, as often as it may be."""
        return self.recording is None and self.trials >= TRIALS


Places = dict[tuple[int, ...], Place]

# Weak, and apart from what Dynamo keeps: recordings go with the model, and with the compiled graph.
_places: WeakKeyDictionary[nn.Module, WeakKeyDictionary[object, Places]] = WeakKeyDictionary()


def places_of(module: nn.Module, graph: object) -> Places:
    """The places of a graph that runs for a module, by size."""
    graphs = _places.get(module)
    if graphs is None:
        graphs = _places[module] = WeakKeyDictionary()
    return graphs.setdefault(graph, {})


def forget_oldest(places: Places) -> None:
    """Of the sizes that came once, keep the last few."""
    waiting = [sizes for sizes, place in places.items() if place.recording is None]
    for sizes in waiting[:-WAITING]:
        del places[sizes]


def forget(module: nn.Module) -> None:
    """Let go of what was recorded for a module."""
    _places.pop(module, None)
