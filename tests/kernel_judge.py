"""Judging the outputs of a kernel: against float64, in units of the error that the torch lowering makes itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fxfuse import reference
from fxfuse.kernels.early_sums import with_early_sums
from fxfuse.program import Program
from fxfuse.validation import error_ratio

FEW = 8  # samples, below which an error says little
UNLUCKY = 6  # times the root mean square of seven errors: of normal ones, one in a thousand is further off
OTHER_SIZES = (0.6, 0.7, 0.9, 1.1, 1.3, 1.7, 1.9)  # no powers of two: everything is rounded otherwise


def in_float64(program: Program, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The outputs with nothing rounded anywhere."""
    exact = program.retyped(dict.fromkeys(("float16", "bfloat16", "float32"), "float64"))
    return reference.execute(exact, [t.double() if t.is_floating_point() else t for t in tensors])


def limit(dtype: torch.dtype, samples: int) -> float:
    """1.5 times eager's error for float32, twice for lower precisions, and the sampling error of the two root mean squares.

    A root mean square estimated from n values has a relative standard deviation of 1 / sqrt(2 n); of the ratio of two: 1 / sqrt(n).
    For fewer than 8 samples the ratio has no bounded distribution to speak of: 20 catches what is wrong and not merely unlucky.
    """
    return (2.0 if dtype.itemsize < 4 else 1.5) * (1 + 3 / math.sqrt(samples)) if samples >= FEW else 20.0


def steps(tensor: Tensor) -> list[int]:
    """The strides, where there is more than one element to step over."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def failures(program: Program, tensors: Sequence[Tensor], results: Sequence[Tensor]) -> list[str]:
    """What is wrong with the outputs of a kernel, in sentences; empty: nothing."""
    found = []
    eager = reference.execute(program, tensors)
    exact = in_float64(program, tensors)
    for output, ours, theirs, truth in zip(program.outputs, results, eager, exact, strict=True):
        if (ours.shape, ours.dtype, steps(ours)) != (theirs.shape, theirs.dtype, steps(theirs)):
            found.append(f"{output.name}: {tuple(ours.shape)} {ours.stride()} {ours.dtype} is not what the reference gives: "
                         f"{tuple(theirs.shape)} {theirs.stride()} {theirs.dtype}")
            continue
        # Where sums were taken apart, a difference of infinities is one of other infinities: non-finite is all that can be said.
        apart = with_early_sums(program) is not program
        for what in (torch.isfinite,) if apart else (torch.isnan, torch.isposinf, torch.isneginf):
            if not torch.equal(what(ours), what(theirs)):
                found.append(f"{output.name}: {what.__name__} elsewhere than in eager")
        finite = ours.isfinite() & theirs.isfinite() & truth.isfinite()
        # The rounding of a row's statistic moves the whole row: rows are the samples, or columns where rows are summed.
        samples = ours.shape[-1] if output.sums_rows else ours.numel() // max(ours.shape[-1], 1)
        wrong = _inexact(ours[finite], theirs[finite], truth[finite], samples)
        few = samples < FEW and ours.dtype != torch.float64
        if wrong and few and _is_as_near_as_others(program, tensors, output.name, ours, truth):
            continue
        found += [f"{output.name}: {sentence}" for sentence in wrong]
    return found


def _is_as_near_as_others(program: Program, tensors: Sequence[Tensor], name: str, ours: Tensor, truth: Tensor) -> bool:
    """Is a result of few numbers as near to the truth as eager's are over inputs of other sizes: where terms cancel, eager's own error
    on the very inputs is a matter of luck, and may be next to nothing."""
    index = [output.name for output in program.outputs].index(name)
    errors = []
    for factor in OTHER_SIZES:
        scaled = [t * factor if t.is_floating_point() else t for t in tensors]
        errors.append(_relative(reference.execute(program, scaled)[index], in_float64(program, scaled)[index]))
    typical = math.sqrt(sum(error**2 for error in errors) / len(errors))
    return _relative(ours, truth) <= UNLUCKY * typical


def _relative(result: Tensor, truth: Tensor) -> float:
    return float((result.double() - truth).norm() / truth.norm().clamp(min=torch.finfo(torch.float64).tiny))


def _inexact(ours: Tensor, theirs: Tensor, truth: Tensor, samples: int) -> list[str]:
    if ours.numel() == 0:
        return []
    if ours.dtype == torch.float64:  # eager is the truth: no ratio, but nothing like a float32 error either
        worst = float((ours - truth).abs().max() / truth.abs().max().clamp(min=1e-6))
        return [] if worst < 1e-10 else [f"off by {worst:.1e} in float64"]
    ratio = error_ratio(ours, theirs, truth)
    return [] if ratio <= limit(ours.dtype, samples) else [f"{ratio:.2f} times the error of eager ({samples} samples)"]
