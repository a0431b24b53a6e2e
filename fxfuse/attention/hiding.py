"""Which operand of the row program hides keys, proven by running the program; and which keys it hides from a chunk of queries.

An additive mask holds the least number of its dtype (or minus infinity) where a query may not see a key, a boolean one a truth value.
That such a key has no part in the result is a property of the program, not of a name: the program is run with some keys hidden and
without those keys, and has to give the same weights and gradients, and zeros for the hidden keys.

Which keys a chunk sees is read from the mask on the device, and the host must know it: one wait for each mask and step, as all
layers share a mask. Under the capture of a CUDA graph nothing is read, and every key enters.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..program import Argument, Program
from .known_masks import once_for_mask
from .programs import backward_program, cotangent_of, statistics_of, with_statistics

Spans = tuple[tuple[int, int], ...]
# Keys enter products from a multiple of this many to another.
STEP = 64


class Mask(NamedTuple):
    """The position of the hiding operand among the program's arguments, and the truth value that hides, None for numbers."""

    position: int
    hides: bool | None


@lru_cache(maxsize=256)
def mask_of(program: Program, scores: str) -> Mask | None:
    """The one operand that is proven to hide keys, or None."""
    found = []
    for position, argument in enumerate(program.arguments):
        if argument.name == scores or not isinstance(argument.columns, str):
            continue
        if argument.kind == "real" and all(_has_no_part(program, scores, position, v) for v in (_least(argument), -torch.inf)):
            found.append(Mask(position, None))
        found += [Mask(position, hides) for hides in (False, True)
                  if argument.kind == "bool" and _has_no_part(program, scores, position, hides)]
    return found[0] if len(found) == 1 else None


def _least(argument: Argument) -> float:
    return torch.finfo(reference.torch_dtype(argument.dtype)).min


def _has_no_part(program: Program, scores: str, position: int, value: float | bool) -> bool:
    """Do keys where an operand has this value change nothing, whatever the scores are."""
    keys, first, last = 24, 5, 17
    forward = with_statistics(program, scores)
    backward = backward_program(forward, scores)
    generator = torch.Generator().manual_seed(3)
    for scale in (1e-2, 1.0, 30.0):
        operands = [_drawn(a, keys, scale, generator) for a in program.arguments]
        operands[position][..., :first] = value
        operands[position][..., last:] = value
        operands[position][..., first:last] = (not value) if isinstance(value, bool) else 0
        arriving = torch.randn(1, 1, 3, keys, generator=generator)
        whole = _both(program, forward, backward, operands, arriving)
        inside = [t[..., first:last] if isinstance(a.columns, str) else t for a, t in zip(program.arguments, operands, strict=True)]
        part = _both(program, forward, backward, inside, arriving[..., first:last])
        for a, b in zip(whole, part, strict=True):
            outside = torch.cat([a[..., :first], a[..., last:]], -1)
            if bool(outside.ne(0).any()) or not torch.allclose(a[..., first:last].float(), b.float(), rtol=2**-7, atol=1e-6 * scale):
                return False
    return True


def _both(program: Program, forward: Program, backward: Program, operands: Sequence[Tensor], arriving: Tensor) -> list[Tensor]:
    """Weights and gradient of the scores."""
    weights, *statistics = reference.execute(forward, operands)
    named = dict(zip((a.name for a in program.arguments), operands, strict=True))
    named |= dict(zip(statistics_of(forward), statistics, strict=True)) | {cotangent_of(forward): arriving.to(weights.dtype)}
    return [weights, reference.execute(backward, [named[a.name] for a in backward.arguments])[1]]


def _drawn(argument: Argument, keys: int, scale: float, generator: torch.Generator) -> Tensor:
    shape = (1, 1, 3 if argument.rows[-1] else 1, keys if isinstance(argument.columns, str) else 1)
    if argument.kind == "real":
        return (torch.randn(shape, generator=generator) * scale).to(reference.torch_dtype(argument.dtype))
    return torch.zeros(shape, dtype=reference.torch_dtype(argument.dtype))


def seen_keys(mask: Tensor, hides: bool | None, queries: Sequence[tuple[int, int]]) -> Spans:
    """For each chunk of queries the first key that one of them sees, and the one after the last. mask: [b or 1, h or 1, q or 1, keys].

    A chunk with a query that sees no key at all gets every key: what such a query gives depends on their number.
    """
    keys = mask.shape[-1]
    everything = tuple((0, keys) for _ in queries)
    if len(queries) < 2 or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        return everything
    return once_for_mask(mask, (hides, tuple(queries)), lambda: _read(mask, hides, queries))


def _read(mask: Tensor, hides: bool | None, queries: Sequence[tuple[int, int]]) -> Spans:
    visible = mask > torch.finfo(mask.dtype).min if hides is None else mask != hides
    visible = visible.expand(-1, -1, queries[-1][1], -1)
    keys = visible.shape[-1]
    place = torch.arange(keys, device=mask.device)
    by_query = visible.flatten(0, 1).any(0)
    none = ~visible.any(-1).flatten(0, 1).all(0)
    found = [torch.stack([
        torch.where(by_query[start:stop].any(0), place, keys).amin(),
        torch.where(by_query[start:stop].any(0), place + 1, 0).amax(),
        none[start:stop].any().long(),
    ]) for start, stop in queries]  # fmt: skip
    spans = []
    for first, last, blind in torch.stack(found).tolist():
        spans.append((0, keys) if blind or last <= first else (first // STEP * STEP, min(keys, -(-last // STEP) * STEP)))
    return tuple(spans)
