"""The normal forms of all patterns, written down beforehand: to trace and normalise every one takes a second or two.

    python -m fxfuse.form_table          # writes fxfuse/form_table.json anew; after a change of a pattern

An entry says where a form comes from (the rule, its function, the case of it) and what forms equal to it have in common, so that the
one that is looked for can be made alone. A table of other sources than these is not used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

HOME = Path(__file__).resolve().parent
PATH = HOME / "form_table.json"
# What a form follows from, beside the patterns themselves.
SOURCES = ("form_table.py", "functions.py", "naming.py", "normal_form.py", "pattern_trace.py", "rules.py")


class Entry(NamedTuple):
    """kind, function, case: of the rule's functions of a kind, the position and the position among its cases. skeletons: see
    normal_form.py; operations: see naming.py."""

    rule: str
    kind: str
    function: int
    case: int
    skeletons: tuple[str, ...]
    operations: tuple[str, ...]


def fingerprint() -> str:
    """Of the sources that a table was made from."""
    patterns = next(folder for folder in (HOME / "patterns", HOME.parent / "patterns") if folder.is_dir())
    files = [*sorted(patterns.glob("*.py")), *(HOME / name for name in SOURCES)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:32]


@cache
def read() -> tuple[Entry, ...] | None:
    """The table; None if there is none of these sources."""
    if not PATH.exists():
        return None
    found = json.loads(PATH.read_text())
    if found["fingerprint"] != fingerprint():
        return None
    return tuple(Entry(rule, kind, function, case, tuple(skeletons), tuple(operations))
                 for rule, kind, function, case, skeletons, operations in found["entries"])


def made() -> Iterator[Entry]:
    """The table's entries, found out."""
    from .naming import operations
    from .rules import KINDS, load_patterns

    for kind in KINDS:
        for name, rule in load_patterns().items():
            for position, (function, but_for) in enumerate(rule.functions(kind)):
                for number, case in enumerate(rule.cases(function)):
                    form = rule.form(case, but_for).form
                    yield Entry(name, kind, position, number, form.skeletons, tuple(operations(form)))


def main() -> None:
    lines = ",\n".join(json.dumps(entry) for entry in made())
    PATH.write_text(f'{{"fingerprint": "{fingerprint()}",\n"entries": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
