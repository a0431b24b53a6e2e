"""Do two loss curves differ by more than rounding? Judged against a run of twice the precision.

Training is chaotic: any change of rounding grows with the steps, so no fixed tolerance is right. What can be
asked of the fused run is what is asked of every fused op: to be as near to the exact result as eager is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, sqrt

# The distances of two runs with independent roundings differ by about a factor of two now and then; a missing
# term of one gradient moves a curve by thousands of times its rounding.
FACTOR = 3.0


@dataclass(frozen=True)
class Verdict:
    """``ours`` and ``eager``: root mean square distance from the curve of twice the precision."""

    agrees: bool
    ours: float
    eager: float
    sentence: str


def agreement(
    eager: Sequence[float], fused: Sequence[float], exact: Sequence[float], eps: float
) -> Verdict:
    """Is the fused curve as near to the exact one as eager's is?

    ``eps``: the machine epsilon of the model's dtype. Distances under one rounding of the loss mean nothing.
    """
    ours, theirs = _distance(fused, exact), _distance(eager, exact)
    one_rounding = eps * max(map(abs, exact))
    agrees = all(map(isfinite, fused)) and ours <= FACTOR * max(theirs, one_rounding)
    said = "the same curve" if agrees else "NOT the same curve"
    sentence = (
        f"{said}: over {len(exact)} steps, "
        f"fused is {ours:.1e} and eager {theirs:.1e} from the same training in twice the precision (rms)"
    )
    return Verdict(agrees, ours, theirs, sentence)


def _distance(a: Sequence[float], b: Sequence[float]) -> float:
    return sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a))
