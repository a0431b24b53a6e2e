"""Rules: named patterns, each a plain PyTorch function, and the name that a row program gets from them.

    @pattern(absent={"w": 1})
    def rms_norm(x: Full, w: Column, *, eps: float = constant(1e-6)):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w

The function is called as it stands (documentation, oracle), traced to a row program (``derive``), and its normal form is what
regions are compared with. Annotations say what an operand varies over; a ``constant`` stands for any number; ``one_of`` for each of
several functions; ``absent`` operands may be missing, and then are 0 or 1. ``@rule.also`` adds a spelling that normal forms do not
identify, ``@rule.near_miss(sentence)`` one that must not match, with what is to be said about it.

A name changes nothing about how a region is computed or differentiated: it is for people, and for ``rules=`` and ``exclude=``.
"""

from __future__ import annotations

import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_type_hints, overload

import torch
from torch import Tensor

from . import earlier_runs
from .normal_form import RELATIVE_TOLERANCE, Binding, NormalForm, normal_form, unify
from .program import Program

UNNAMED = "unnamed"
PATTERN_MODULES = ("norm", "rope", "gated_mlp", "activation", "loss", "softmax")


class Shape(NamedTuple):
    """The example that an annotated operand is traced with. ``either``: rows may or may not share it."""

    sizes: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    either: bool = False

    def example(self) -> Tensor:
        return torch.zeros(self.sizes, dtype=self.dtype)


def operand(*sizes: int, dtype: torch.dtype = torch.float32, either: bool = False) -> Any:
    """The annotation of an operand."""
    return Annotated[Tensor, Shape(sizes, dtype, either)]


if TYPE_CHECKING:
    Full = Column = Row = Positions = HalfPositions = Shared = Logits = Labels = Tensor
else:
    Full = operand(2, 3, 8)
    Column = operand(8)
    Row = operand(2, 3, 1)
    Positions = operand(2, 1, 8, either=True)  # cosines and sines: shared by the heads, or not
    HalfPositions = operand(2, 1, 4, either=True)
    Shared = operand(2, 1, 8, either=True)
    Logits = operand(6, 8)
    Labels = operand(6, dtype=torch.int64)


class Constant(float):
    """A number that may be any number in a match. As itself it is the usual one."""


class OneOf(tuple):
    """Functions of which any may stand in a match. Called, it is the first."""

    def __call__(self, *args: Any) -> Any:
        return self[0](*args)


def constant(usual: float) -> Any:
    return Constant(usual)


def one_of(*functions: Callable[..., Any]) -> Any:
    return OneOf(functions)


def usual(function: Callable[..., Any]) -> Callable[..., Any]:
    """A pattern with its usual constants and the first of its alternatives, as a function of its operands alone."""
    defaults = {n: p.default for n, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}
    chosen = {n: v[0] if isinstance(v, OneOf) else float(v) for n, v in defaults.items() if isinstance(v, (OneOf, Constant))}
    return partial(function, **chosen) if chosen else function


class Named(NamedTuple):
    """The rule of a row program, ``unnamed`` if none has its normal form, and then what it nearly is."""

    rule: str
    near_miss: str = ""


class Form(NamedTuple):
    """One normal form of a rule; ``parameters`` are the values its constants were traced with."""

    rule: str
    form: NormalForm
    parameters: Mapping[str, float]
    but_for: str = ""


@dataclass
class Rule:
    """A named pattern: its functions, and the near misses that are not it."""

    name: str
    function: Callable[..., Any]
    absent: Mapping[str, int] = field(default_factory=dict)
    spellings: list[Callable[..., Any]] = field(default_factory=list)
    near_misses: list[tuple[str, Callable[..., Any]]] = field(default_factory=list)

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self.function(*args, **named)

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return self.function.__doc__

    def functions(self) -> Iterator[Callable[..., Any]]:
        """All that were registered: the rule's own, other spellings, near misses."""
        yield from (self.function, *self.spellings, *(function for _, function in self.near_misses))

    def also(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: another way to write the rule, which normal forms cannot tell to be equal."""
        self.spellings.append(function)
        _index.cache_clear()
        return function

    def near_miss(self, sentence: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator: a function that is the rule but for what the sentence says."""

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            self.near_misses.append((sentence, function))
            _index.cache_clear()
            return function

        return register

    def forms(self, also: bool) -> Iterator[Form]:
        """The forms of the function itself, or of its other spellings."""
        for function in self.spellings if also else [self.function]:
            yield from self._forms_of(function, "")

    def near_forms(self) -> Iterator[Form]:
        for sentence, function in self.near_misses:
            yield from self._forms_of(function, sentence)

    def _forms_of(self, function: Callable[..., Any], but_for: str) -> Iterator[Form]:
        for program, parameters in variants(function):
            shared = [name for name, shape in operand_shapes(function).items() if shape.either]
            for varying in {frozenset[str](), frozenset(shared)}:
                for absent in self._absences(program):
                    form = normal_form(program, varying, tuple(parameters.values()), absent)
                    yield Form(self.name, form, parameters, but_for)

    def _absences(self, program: Program) -> Iterator[tuple[tuple[str, int], ...]]:
        """Every set of operands that may be missing, the empty one first."""
        items = [(name, value) for name, value in self.absent.items() if name in program.argument_index]
        return itertools.chain.from_iterable(itertools.combinations(items, count) for count in range(len(items) + 1))


def operand_shapes(function: Callable[..., Any]) -> dict[str, Shape]:
    """The tensors that a pattern takes, by their annotations; what says nothing is Full."""
    hints = get_type_hints(function, include_extras=True)
    shapes: dict[str, Shape] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            annotated = getattr(hints.get(name), "__metadata__", getattr(Full, "__metadata__", ()))
            shapes[name] = next(m for m in annotated if isinstance(m, Shape))
    return shapes


def variants(function: Callable[..., Any]) -> Iterator[tuple[Program, dict[str, float]]]:
    """The row program of a pattern for each combination of its alternatives, and the constants it was traced with."""
    from .pattern_trace import pattern_program  # the tracer reads regions, which know nothing of rules

    keywords = {n: p.default for n, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}
    # Numbers that no pattern contains, so that what comes of them is known again in the program.
    parameters = {n: float(v) * 1.01234567 for n, v in keywords.items() if isinstance(v, Constant)}
    choices = {n: v for n, v in keywords.items() if isinstance(v, OneOf)}
    examples = {name: shape.example() for name, shape in operand_shapes(function).items()}
    for chosen in itertools.product(*choices.values()):
        alternatives = dict(zip(choices, chosen, strict=True))
        yield pattern_program(function, examples, {**parameters, **alternatives}), parameters


RULES: dict[str, Rule] = {}


@overload
def pattern(function: Callable[..., Any], /) -> Rule: ...
@overload
def pattern(*, absent: Mapping[str, int] | None = None, name: str | None = None) -> Callable[[Callable[..., Any]], Rule]: ...
def pattern(function: Callable[..., Any] | None = None, /, *, absent: Mapping[str, int] | None = None,
            name: str | None = None) -> Any:
    """Decorator: register a plain PyTorch function as a rule, under its own name."""
    if function is None:
        return partial(_register, absent=absent or {}, name=name)
    return _register(function, absent={}, name=name)


def _register(function: Callable[..., Any], absent: Mapping[str, int], name: str | None) -> Rule:
    rule = Rule(name or function.__name__, function, absent)
    RULES[rule.name] = rule
    _index.cache_clear()
    return rule


def load_patterns() -> dict[str, Rule]:
    """Every rule by name, those of fxfuse.patterns among them."""
    for module in PATTERN_MODULES:
        import_module(f"fxfuse.patterns.{module}")
    return RULES


class _Index:
    """Forms by what equal forms have in common, made as far as one is looked for: most regions are of the first ones."""

    def __init__(self, forms: Iterator[Form]) -> None:
        self.coming = forms
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

    def first_of_each(self) -> list[Form]:
        for _ in self.rest():
            pass
        return [forms[0] for forms in self.made.values()]


@lru_cache(maxsize=2)
def _index(near: bool) -> _Index:
    rules = load_patterns().values()
    if near:
        return _Index(form for rule in rules for form in rule.near_forms())
    return _Index(form for also in (False, True) for rule in rules for form in rule.forms(also))


@lru_cache(maxsize=4096)
def name_of(program: Program) -> Named:
    """The rule whose normal form a program has; where there is none, the rule that it nearly is.

    Kept on disk: the forms of all rules are a second's work. With rules that somebody else registered every run finds out anew."""
    load_patterns()
    ours = all(function.__module__.startswith("fxfuse.patterns.") for rule in RULES.values() for function in rule.functions())
    known = earlier_runs.recall("names", str(program)) if ours else None
    named = _name_of(program) if known is None else Named(*known)
    if ours and known is None:
        earlier_runs.remember("names", named, str(program))
    return named


def _name_of(program: Program) -> Named:
    form = normal_form(program)
    names = _covering(form, _index(near=False))
    if len(names) == 1:
        return Named(names[0].rule)
    if names:
        return Named(UNNAMED, f"several rules in one region: {', '.join(n.rule for n in names)}")
    near = _covering(form, _index(near=True))
    if near:
        return Named(UNNAMED, f"{with_article(near[0].rule)} but for: {near[0].but_for}")
    return Named(UNNAMED, _closest(form))


def _covering(form: NormalForm, index: _Index) -> list[Form]:
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


def _closest(form: NormalForm) -> str:
    """A sentence about the rule with nearly the same operations, or nothing."""
    own = Counter(_operations(form))
    best: tuple[int, str, Counter[str], Counter[str]] | None = None
    for candidate in _index(near=False).first_of_each():
        theirs = Counter(_operations(candidate.form))
        missing, surplus = theirs - own, own - theirs
        distance = missing.total() + surplus.total()
        if best is None or distance < best[0]:
            best = distance, candidate.rule, missing, surplus
    if best is None or best[0] > 3 or best[0] >= own.total():
        return ""
    _, rule, missing, surplus = best
    said = [f"without {', '.join(sorted(missing))}"] if missing else []
    said += [f"with {', '.join(sorted(surplus))} besides"] if surplus else []
    return f"{with_article(rule)} but for: {' and '.join(said) or 'the same operations, put together otherwise'}"


def _operations(form: NormalForm) -> Iterator[str]:
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
