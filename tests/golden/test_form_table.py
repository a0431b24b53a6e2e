"""The written table of normal forms is the one that these patterns have, and nothing but time depends on it."""

from __future__ import annotations

import pytest

from fxfuse import form_table, naming
from tests.kernel_programs import BY_NAME


@pytest.fixture
def anew() -> None:
    for cached in (naming.name_of, naming._index, form_table.read):
        cached.cache_clear()
    yield
    for cached in (naming.name_of, naming._index, form_table.read):
        cached.cache_clear()


def test_the_table_is_that_of_these_sources() -> None:
    assert form_table.read() is not None, "a pattern changed: python -m fxfuse.form_table"
    assert tuple(form_table.made()) == form_table.read(), "python -m fxfuse.form_table"


@pytest.mark.parametrize("name", ["rms_norm", "swiglu", "rotary", "layer_norm_backward", "functions"])
def test_names_are_the_same_without_it(name: str, anew, monkeypatch) -> None:
    program = BY_NAME[name].program("bfloat16")
    found = naming.name_of(program)
    for cached in (naming.name_of, naming._index, form_table.read):
        cached.cache_clear()
    monkeypatch.setattr(form_table, "fingerprint", lambda: "other sources")
    assert form_table.read() is None
    assert naming.name_of(program) == found
