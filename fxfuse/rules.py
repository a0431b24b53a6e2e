"""Rules: named patterns, each a plain PyTorch function, and the name that a row program gets from them.

    @pattern(absent={"w": 1})
    def rms_norm(x: Full, w: Column, *, eps: float = constant(1e-6)):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w

The function is called as it stands (documentation, oracle), traced to a row program (``derive``), and its normal form is what
regions are compared with. Annotations say what an operand varies over; a ``constant`` stands for any number; ``one_of`` for each of
several functions; ``absent`` operands may be missing, and then are 0 or 1. ``@rule.also`` adds a spelling that normal forms do not
identify, ``@rule.near_miss(sentence)`` one that must not match, with what is to be said about it.

How a program gets its name stands in naming.py.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_type_hints, overload

import torch
from torch import Tensor

from .normal_form import NormalForm, normal_form
from .program import Program

KINDS = ("own", "also", "near")  # of the functions of a rule
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


class Form(NamedTuple):
    """One normal form of a rule; ``parameters`` are the values its constants were traced with."""

    rule: str
    form: NormalForm
    parameters: Mapping[str, float]
    but_for: str = ""


class Case(NamedTuple):
    """One thing that a function of a rule may stand for: a variant of it, which operands vary over rows, which are missing."""

    program: Program
    varying: frozenset[str]
    parameters: Mapping[str, float]
    absent: tuple[tuple[str, int], ...]


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

    def also(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: another way to write the rule, which normal forms cannot tell to be equal."""
        self.spellings.append(function)
        return function

    def near_miss(self, sentence: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator: a function that is the rule but for what the sentence says."""

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            self.near_misses.append((sentence, function))
            return function

        return register

    def functions(self, kind: str) -> list[tuple[Callable[..., Any], str]]:
        """What was registered: the rule's "own" function, those "also" it, those "near" it with what is to be said of them."""
        if kind == "own":
            return [(self.function, "")]
        if kind == "also":
            return [(function, "") for function in self.spellings]
        return [(function, sentence) for sentence, function in self.near_misses]

    def forms(self, kind: str) -> Iterator[Form]:
        """The normal forms of functions of a kind."""
        for function, but_for in self.functions(kind):
            yield from (self.form(case, but_for) for case in self.cases(function))

    def cases(self, function: Callable[..., Any]) -> Iterator[Case]:
        """Everything that a function may stand for, in one order always."""
        shared = frozenset(name for name, shape in operand_shapes(function).items() if shape.either)
        for program, parameters in variants(function):
            for varying in dict.fromkeys((frozenset[str](), shared)):
                for absent in self._absences(program):
                    yield Case(program, varying, parameters, absent)

    def form(self, case: Case, but_for: str) -> Form:
        form = normal_form(case.program, case.varying, tuple(case.parameters.values()), case.absent)
        return Form(self.name, form, case.parameters, but_for)

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
    return rule


def load_patterns() -> dict[str, Rule]:
    """Every rule by name, those of fxfuse.patterns among them."""
    for module in PATTERN_MODULES:
        import_module(f"fxfuse.patterns.{module}")
    return RULES


def all_registered() -> Iterator[Callable[..., Any]]:
    """The functions of all rules."""
    for rule in load_patterns().values():
        yield from (function for kind in KINDS for function, _ in rule.functions(kind))
