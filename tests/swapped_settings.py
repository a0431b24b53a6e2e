"""Pieces of torch replaced for a moment, as capture replaces them while it traces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def settings(*given: tuple[Any, str, Any]) -> Iterator[None]:
    """Each of (owner, name, value) in place."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, value in given:
            patch.setattr(owner, name, value)
        yield
