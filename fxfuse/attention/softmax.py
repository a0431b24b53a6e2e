"""Is a row program a softmax of a function of single scores, as library kernels with a pluggable score function have it.

    weights = exp(x - max x) / sum exp(x - max x)        x = f(score, mask)

What is read off the program is f, as a function of one score, and which statistics are the maximum and the sum. That the mask hides
keys is proven elsewhere (hiding.py); here it only must be all that f reads beside the score.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..functions import FUNCTIONS
from ..program import REDUCTIONS, Program, parse
from .hiding import Mask, mask_of
from .programs import statistics_of


@dataclass(frozen=True)
class Softmax:
    """program: with its statistics   logits: the value that is x   maximum, total: names of outputs   mask: what hides keys"""

    program: Program
    scores: str
    logits: int
    maximum: str
    total: str
    mask: Mask | None

    def score_function(self) -> Callable[..., Tensor]:
        """f of a score (and of where it stands, which does not matter), for a key that is seen."""
        seen = 0.0 if self.mask is None or self.mask.hides is None else not self.mask.hides

        def modified(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            values: dict[int, Tensor | float | bool] = {}
            for index, node in enumerate(self.program.nodes[: self.logits + 1]):
                operands = [values.get(v) for v in node.operands]
                if node.op == "load":
                    values[index] = score.float() if node.attributes[0] == self.scores else seen
                elif node.op == "const":
                    values[index] = node.attributes[0]
                elif node.op == "cast":
                    values[index] = operands[0].to(getattr(torch, node.attributes[0])).float()  # type: ignore[union-attr]
                elif all(v in values for v in node.operands):
                    values[index] = _apply(node.op, operands)
            result = values[self.logits]
            assert isinstance(result, Tensor)
            return result

        return without_types(modified)


F = TypeVar("F", bound=Callable[..., Any])


def without_types(function: F) -> F:
    """The same function. Traced, its graph would bear the types, which are texts here, and could not be kept on disk by Inductor."""
    function.__annotations__.clear()
    return function


_WITH_NUMBERS: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "neg": operator.neg}


def _apply(op: str, operands: list) -> Tensor | float | bool:
    """One pointwise function; with what is cheap in a kernel: no division by a constant, no branches in tanh."""
    if op == "div" and not isinstance(operands[1], Tensor):
        return operands[0] * (1.0 / operands[1])
    if op == "add" and any(not isinstance(x, Tensor) and x == 0.0 for x in operands):
        return next((x for x in operands if isinstance(x, Tensor)), 0.0)
    if op in _WITH_NUMBERS:
        return _WITH_NUMBERS[op](*operands)
    if op == "tanh":
        return torch.sigmoid(operands[0] * 2.0) * 2.0 - 1.0  # whose derivative does not overflow either
    if not any(isinstance(x, Tensor) for x in operands):
        operands = [torch.tensor(x) for x in operands]
    like = next(x for x in operands if isinstance(x, Tensor))
    return FUNCTIONS[op].eager(*(x if isinstance(x, Tensor) else torch.full_like(like, x, dtype=_dtype(x, like)) for x in operands))


def _dtype(number: float | bool, like: Tensor) -> torch.dtype:
    return torch.bool if isinstance(number, bool) else like.dtype if like.is_floating_point() else torch.float32


@lru_cache(maxsize=256)
def softmax_of(text: str, scores: str) -> Softmax | None:
    """The softmax that a program (with its statistics) is, or None."""
    program = parse(text)
    (weights, _), = program.outputs[0].stores
    quotient = _past(program, weights, "cast")
    if program.nodes[quotient].op != "div":
        return None
    exponential, total = program.nodes[quotient].operands
    difference = program.nodes[exponential].operands[0] if program.nodes[exponential].op == "exp" else -1
    if program.nodes[total].op != "sum" or program.nodes[total].operands != (exponential,) or program.nodes[difference].op != "sub":
        return None
    logits, maximum = program.nodes[difference].operands
    most = program.nodes[_past(program, maximum, "stop")]
    if most.op != "max" or most.operands != (logits,):
        return None
    stored = {_past(program, output.stores[0][0], "stop"): output.name for output in program.outputs[1:]}
    names = stored.get(_past(program, maximum, "stop")), stored.get(total)
    mask = mask_of(Program(program.rank, program.math, program.axes, program.arguments, program.nodes, program.outputs[:1]), scores)
    read = {a.name for a in program.arguments} - {scores}
    if None in names or set(statistics_of(program)) != set(names) or len(read) != (mask is not None) or program.math != "float32":
        return None
    if any(node.op in (*REDUCTIONS, "iota", "check_index", "width") for node in program.nodes[: logits + 1]):
        return None
    return Softmax(program, scores, logits, *names, mask)  # type: ignore[arg-type]


def _past(program: Program, value: int, op: str) -> int:
    return program.nodes[value].operands[0] if program.nodes[value].op == op else value
