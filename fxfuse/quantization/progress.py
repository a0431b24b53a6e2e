"""A progress bar for work that people wait for: on a terminal only, and only once it has lasted two seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


class Progress:
    """``over`` yields the items; what it shows is tqdm's."""

    def over(self, items: Sequence[T], what: str) -> Iterator[T]:
        try:
            from tqdm import tqdm
        except ImportError:  # a convenience: transformers brings it, the library does not need it
            yield from items
            return
        yield from tqdm(items, desc=what, delay=2, leave=False, disable=not sys.stderr.isatty())
