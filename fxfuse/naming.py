"""The name that a row program gets: the rule whose normal form it has, or what it nearly is.

A name changes nothing about how a region is computed or differentiated: it is for people, and for ``rules=`` and ``exclude=``.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

from . import earlier_runs, form_table
from .form_table import Entry
from .normal_form import RELATIVE_TOLERANCE, Binding, NormalForm, normal_form, unify
from .program import Program
from .rules import RULES, Form, all_registered, load_patterns

UNNAMED = "unnamed"


class Named(NamedTuple):
    """The rule of a row program, ``unnamed`` if none has its normal form, and then what it nearly is."""

    rule: str
    near_miss: str = ""


class _Index:
    """Forms by what equal forms have in common, made as far as one is looked for: most regions are of the first ones."""

    def __init__(self, coming: Iterator[Form]) -> None:
        self.coming = coming
        self.made: dict[tuple[str, ...], list[Form]] = {}

    def __call__(self, skeletons: tuple[str, ...]) -> Iterator[Form]:
        yield from self.made.get(skeletons, ())
        for form in self.rest():
            if form.form.skeletons == skeletons:
                yield form

    def rest(self) -> Iterator[Form]:
        try:
            for form in self.coming:
                self.made.setdefault(form.form.skeletons, []).append(form)
                yield form
        except Exception:  # a pattern that cannot be traced: the next look starts afresh, and says so again
            _index.cache_clear()
            raise

    def first_of_each(self) -> list[tuple[str, Counter[str]]]:
        """The rules, and the operations of one form of each kind."""
        for _ in self.rest():
            pass
        return [(forms[0].rule, Counter(operations(forms[0].form))) for forms in self.made.values()]


class _TableIndex:
    """The same by a table in which all forms were written down beforehand (form_table.py): one that is looked for alone is made."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = entries
        self.by_skeletons: dict[tuple[str, ...], list[Entry]] = {}
        for entry in entries:
            self.by_skeletons.setdefault(entry.skeletons, []).append(entry)

    def __call__(self, skeletons: tuple[str, ...]) -> Iterator[Form]:
        for entry in self.by_skeletons.get(skeletons, ()):
            yield _form_of(entry)

    def first_of_each(self) -> list[tuple[str, Counter[str]]]:
        return [(entries[0].rule, Counter(entries[0].operations)) for entries in self.by_skeletons.values()]


@lru_cache(maxsize=256)
def _form_of(entry: Entry) -> Form:
    rule = RULES[entry.rule]
    function, but_for = rule.functions(entry.kind)[entry.function]
    return rule.form(next(itertools.islice(rule.cases(function), entry.case, None)), but_for)


@lru_cache(maxsize=4)
def _index(near: bool, registered: tuple[Callable[..., Any], ...]) -> _Index | _TableIndex:
    """Of these functions: one that is registered later makes another index."""
    rules = load_patterns().values()
    table = form_table.read() if _ours_alone() else None
    if table is not None:
        return _TableIndex([entry for entry in table if (entry.kind == "near") == near])
    if near:
        return _Index(form for rule in rules for form in rule.forms("near"))
    return _Index(form for kind in ("own", "also") for rule in rules for form in rule.forms(kind))


def _ours_alone() -> bool:
    """Whether nobody registered other rules."""
    return all((function.__module__ or "").startswith("fxfuse.patterns.") for function in all_registered())


@lru_cache(maxsize=4096)
def name_of(program: Program) -> Named:
    """The rule whose normal form a program has; where there is none, the rule that it nearly is.

    Kept on disk: the forms of all rules are a second's work. With rules that somebody else registered every run finds out anew."""
    ours = _ours_alone()
    known = earlier_runs.recall("names", str(program)) if ours else None
    named = _name_of(program) if known is None else Named(*known)
    if ours and known is None:
        earlier_runs.remember("names", named, str(program))
    return named


def _name_of(program: Program) -> Named:
    form = normal_form(program)
    registered = tuple(all_registered())
    names = _covering(form, _index(False, registered))
    if len(names) == 1:
        return Named(names[0].rule)
    if names:
        return Named(UNNAMED, f"several rules in one region: {', '.join(n.rule for n in names)}")
    near = _covering(form, _index(True, registered))
    if near:
        return Named(UNNAMED, f"{with_article(near[0].rule)} but for: {near[0].but_for}")
    return Named(UNNAMED, _closest(form, _index(False, registered)))


def _covering(form: NormalForm, index: _Index | _TableIndex) -> list[Form]:
    """Rules that together give every output: one for all of them, or one for each of several parts. Empty if some is left."""
    whole = _matching(form, index(form.skeletons))
    if whole is not None or not form.outputs:
        return [] if whole is None else [whole]
    parts: dict[str, Form] = {}
    left = list(form.outputs)
    while left:
        sizes = range(min(len(left), 3), 0, -1)
        subsets = (subset for size in sizes for subset in itertools.combinations(left, size) if left[0] in subset)
        for subset in subsets:
            part = replace(form, outputs=subset)
            found = _matching(part, index(part.skeletons))
            if found is not None:
                parts[found.rule] = found
                left = [e for e in left if e not in subset]
                break
        else:
            return []
    return list(parts.values())


def _matching(form: NormalForm, candidates: Iterable[Form]) -> Form | None:
    for candidate in candidates:
        for binding in unify(candidate.form, form, partial(_fits, candidate)):
            if _consistent(candidate, form, binding):
                return candidate
    return None


def _roles(parameters: Mapping[str, float], number: float) -> list[tuple[str, Callable[[float], float]]]:
    """Which parameters a constant of a pattern comes from, and how to get the parameter back from it."""
    inverses: tuple[Callable[[float], float], ...] = (lambda v: v, lambda v: 1 / v, lambda v: 1 - v)
    return [(name, inverse) for name, value in parameters.items() for inverse in inverses
            if number and abs(inverse(number) - value) < 1e-6 * abs(value)]


def _fits(candidate: Form, symbol: Any, number: float) -> bool:
    """A parameter may be any number, an integer too (an index); other constants are what the pattern says."""
    own = candidate.form.constants[symbol]
    if not isinstance(own, float) or symbol in candidate.form.free:
        return True
    return abs(own - number) <= RELATIVE_TOLERANCE * abs(own)


def _consistent(candidate: Form, form: NormalForm, binding: Binding) -> bool:
    """A parameter that occurs several times is the same number everywhere."""
    values: dict[str, float] = {}
    for symbol, bound in binding.items():
        number = candidate.form.constants.get(symbol)
        if isinstance(number, float):
            for name, inverse in _roles(candidate.parameters, number):
                value = inverse(form.constants[bound])
                if abs(values.setdefault(name, value) - value) > RELATIVE_TOLERANCE * abs(value):
                    return False
    return True


def _closest(form: NormalForm, index: _Index | _TableIndex) -> str:
    """A sentence about the rule with nearly the same operations, or nothing."""
    own = Counter(operations(form))
    best: tuple[int, str, Counter[str], Counter[str]] | None = None
    for rule, theirs in index.first_of_each():
        missing, surplus = theirs - own, own - theirs
        distance = missing.total() + surplus.total()
        if best is None or distance < best[0]:
            best = distance, rule, missing, surplus
    if best is None or best[0] > 3 or best[0] >= own.total():
        return ""
    _, rule, missing, surplus = best
    said = [f"without {', '.join(sorted(missing))}"] if missing else []
    said += [f"with {', '.join(sorted(surplus))} besides"] if surplus else []
    return f"{with_article(rule)} but for: {' and '.join(said) or 'the same operations, put together otherwise'}"


def operations(form: NormalForm) -> Iterator[str]:
    """The names of what a form is put together from."""
    words = {"Pow": "power", "RowSum": "row sum", "RowMax": "row maximum", "Mul": "", "Add": "addition", "ClampMin": "clamp",
             "ClampMax": "clamp", "Compare": "comparison"}
    for e in form.outputs:
        for part in _parts(e):
            name = words.get(type(part).__name__, type(part).__name__.lower())
            if name and part.args:
                yield name


def _parts(e: Any) -> Iterator[Any]:
    yield e
    for a in e.args:
        yield from _parts(a)


def with_article(rule: str) -> str:
    return f"{'an' if rule[0] in 'aeio' or rule.startswith(('rms', 'l2')) else 'a'} {rule}"
