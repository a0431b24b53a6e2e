"""The row programs of a chunk of queries, both derived from the one that the model wrote between its two products.

    forward:   scores, others                                -> weights, row statistics
    backward:  scores, others, row statistics, g_<weights>   -> weights again, d_<scores>
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from ..derivation import cotangent_name, derive_backward, gradient_name
from ..memory.restriction import merged, restricted
from ..program import Program
from ..residuals import plan_residuals, saved_names


def weights_of(program: Program) -> str:
    """The output that is multiplied with the values."""
    return program.outputs[0].name


@lru_cache(maxsize=256)
def with_statistics(program: Program, scores: str) -> Program:
    """The program with the numbers per row that its backward reads as further outputs; scores and others are there again."""
    return plan_residuals(program, (scores,), frozenset(a.name for a in program.arguments))


def statistics_of(program: Program) -> tuple[str, ...]:
    return tuple(output.name for output in program.outputs[1:])


@lru_cache(maxsize=256)
def backward_program(program: Program, scores: str) -> Program:
    """Weights and gradient of the scores, in this order, for a program that ``with_statistics`` gave."""
    weights, statistics = weights_of(program), statistics_of(program)
    lives = frozenset(a.name for a in program.arguments)
    saved = tuple(name for name in saved_names(program, (scores,), (weights,), lives) if name != weights)
    gradient = derive_backward(program, (weights,), (scores,), saved)
    union = merged(restricted(program, (weights,), statistics), gradient)
    if union is None:  # one is derived from the other, so they fit; where not, the gradient alone is not enough
        raise AssertionError("the gradient of the scores does not fit the program that it is derived from")
    by_name = {output.name: output for output in union.outputs}
    return replace(union, outputs=(by_name[weights], by_name[gradient_name(scores)])).verify()


def cotangent_of(program: Program) -> str:
    return cotangent_name(weights_of(program))
