"""How many rows of a head count, as far as the host knows it without waiting for the device.

Each call has its count copied to the host when the device gets there. The next call looks at what has arrived and takes it for an
expectation: rows up to it go through cuBLAS, rows after it through products that ask the device. A wrong expectation costs time,
nothing else.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

SELDOM = 4


@dataclass
class Counted:
    """What is known of one head on one device.

    share: of the rows, how many counted in the latest call whose count has arrived; None before the first
    """

    share: float | None = None
    calls: int = 0
    _arriving: list[tuple[Tensor, torch.cuda.Event, int]] = field(default_factory=list)

    def passes(self, most: float) -> bool:
        """Need a call not be counted: more than this share did lately. Every few calls it is looked at again."""
        self.calls += 1
        share = self.look()
        return share is not None and share > most and self.calls % SELDOM != 0

    def look(self) -> float | None:
        """The share as known by now."""
        if self._arriving and self._arriving[0][1].query():
            number, _, rows = self._arriving[0]
            self.share = min(max(int(number) / rows, 0.0), 1.0)
            self._arriving.clear()
        return self.share

    def send(self, count: Tensor, rows: int) -> None:
        """Have a count on the device copied to the host, unless one is on its way."""
        if self._arriving:
            return
        number = torch.empty(count.shape, dtype=count.dtype, pin_memory=True)
        event = torch.cuda.Event()
        with torch.cuda.device_of(count):
            number.copy_(count, non_blocking=True)
            event.record()
        self._arriving.append((number, event, rows))


_KNOWN: dict[Hashable, Counted] = {}
_MOST = 256


def counted(key: Hashable) -> Counted:
    """What is known of a head; a head is known by its program and sizes."""
    if key not in _KNOWN and len(_KNOWN) >= _MOST:
        _KNOWN.clear()
    return _KNOWN.setdefault(key, Counted())
