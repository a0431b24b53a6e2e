"""A progress bar for work that people wait for: on a terminal only, and only once it has lasted two seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def with_progress(items: Sequence[T], what: str) -> Iterable[T]:
    """The items, with tqdm's bar (which transformers brings)."""
    from tqdm import tqdm

    return tqdm(items, desc=what, delay=2, leave=False, disable=not sys.stderr.isatty())
