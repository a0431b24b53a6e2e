"""A site is checked against float64 before it is used: outputs and every gradient, at three scales of the inputs.

The truth is the model's own code, run in float64. The measure is how much further from it the fused op is than that same
code in the model's dtype (closeness.py):

    ratio = rmse(ours - truth) / max(rmse(eager - truth), floor * ulp(dtype) * rms(truth))

The floor is a quarter for 16-bit dtypes. It is one ulp for wider ones: there eager is at times right to the last bit (silu as one
division, 0.3 ulp, where x * sigmoid(x) has 0.6), and a fault is thousands of ulps.

What comes out as a few numbers (a mean loss) has an error that is luck, eager's as well: one too large is looked at again over a number
of draws, where the fault of a wrong program stays and luck does not.

An elementwise tolerance would accept half a missing gradient term in bfloat16 and reject a right kernel on small inputs.

    fast   the model's dtypes on the real lowering; the float32 instance through the torch reference; few rows
    full   both on the real lowering, at several shapes
    off    nothing
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import fx

from . import earlier_runs
from ._torch import disable_current_modes
from .closeness import FEW, Closeness, closeness, error_ratio, same_overflow
from .errors import ValidationError
from .lowering import rehearsal, untimed
from .program import Program
from .regions import Region
from .site_graph import SiteGraph
from .trial import Compared, Trial

__all__ = ["LIMITS", "SCALES", "Verdict", "apart", "error_ratio", "judged", "rehearse", "same_overflow", "validate"]

logger = logging.getLogger("fxfuse")

SCALES = (1e-3, 1.0, 1e3)
# How far from float64, in units of eager's own error. A float64 instance is compared with another order of the same sums.
LIMITS = {torch.float64: 64.0, torch.float32: 1.5, torch.float16: 2.0, torch.bfloat16: 2.0}
ROWS = (256, 37)
FEW_ROWS = 6  # of a region in "fast"
SEEDS = range(8, 24)  # of the draws over which a few numbers are looked at again


@dataclass(frozen=True)
class Verdict:
    """``reason`` is empty where the site may be used; ``error_ratio`` is the worst one seen."""

    error_ratio: float | None = None
    reason: str = ""


_verdicts: dict[tuple, Verdict] = {}
_rehearsed: set[tuple] = set()
_earlier: list[tuple] = []  # of these, those of earlier runs that the report has not told of


def validate(region: Region, program: Program, differentiable: Collection[fx.Node], device: torch.device,
             mode: str = "fast") -> Verdict:
    """May ``program`` (the region's, perhaps with more outputs) stand in for the region on this kind of device?

    differentiable: the graph's nodes whose gradient can be asked for.
    """
    if mode == "off":
        return Verdict()
    site = SiteGraph(region, differentiable)
    return judged((str(program), site.text()), partial(_trials, site, program, device, mode), device, mode)


class Trying(Protocol):
    """Compares, for inputs of a scale and about so many rows."""

    def run(self, scale: float, rows: int) -> Iterator[Compared]: ...


def judged(key: tuple, trials: Callable[[], Iterator[Trying]], device: torch.device, mode: str) -> Verdict:
    """What trials of a site say of it. Sites with equal keys are judged once for a kind of device; on a GPU, and but for "full", once
    for all runs of this build on it."""
    key = (*key, device.type, mode, _autocast_key(device))
    if key not in _verdicts:
        known = _of_an_earlier_run(key, device)
        if known is not None:
            _earlier.append(key)
            _verdicts[key] = known
            return known
        with apart(), untimed():
            if key not in _rehearsed:
                _rehearse_first(trials())
            _verdicts[key] = _judge(trials(), mode)
        if _is_kept(key, device):
            earlier_runs.remember("verdicts", asdict(_verdicts[key]), *_written(key, device))
    return _verdicts[key]


def rehearse(region: Region, program: Program, differentiable: Collection[fx.Node], device: torch.device, mode: str = "fast") -> None:
    """Goes through the launches that ``validate`` will make, under a ``kernels.ahead.rehearsal``."""
    site = SiteGraph(region, differentiable)
    key = (str(program), site.text(), device.type, mode, _autocast_key(device))
    if mode != "off" and key not in _verdicts and _of_an_earlier_run(key, device) is None:
        _rehearsed.add(key)
        with apart(), untimed():
            Trial(site, program, device, {}, most_rows=FEW_ROWS).rehearse(ROWS[0])


def _rehearse_first(trials: Iterator[Trying]) -> None:
    """The launches of a site's first trial, so that its kernels are compiled side by side; what comes out is not looked at."""
    with rehearsal() as useful:
        if not useful:
            return
        try:
            for _ in next(trials).run(1.0, ROWS[0]):
                pass
        except Exception as error:  # what fails fails again in the trial itself, and is told there
            logger.debug("a trial was not rehearsed: %s", error)


def taken_from_earlier_runs() -> int:
    """How many verdicts were, since this was last asked."""
    count = len(_earlier)
    _earlier.clear()
    return count


def _is_kept(key: tuple, device: torch.device) -> bool:
    """Verdicts of kernels on a GPU are kept, if their key is all text."""
    return device.type == "cuda" and key[-2] != "full" and all(isinstance(part, str | int | float | bool) for part in key[:-1])


def _written(key: tuple, device: torch.device) -> tuple[str, ...]:
    return *map(str, key), torch.cuda.get_device_name(device)


def _of_an_earlier_run(key: tuple, device: torch.device) -> Verdict | None:
    found = earlier_runs.recall("verdicts", *_written(key, device)) if _is_kept(key, device) else None
    return None if found is None else Verdict(**found)


def forget_verdicts() -> None:
    """Check everything again from now on."""
    _verdicts.clear()


def _autocast_key(device: torch.device) -> tuple:
    return torch.is_autocast_enabled(device.type), str(torch.get_autocast_dtype(device.type))


@contextmanager
def apart() -> Iterator[None]:
    """Real tensors, gradients on, whatever the caller was doing. (Inputs come from a generator of their own.)

    Hooks on saved tensors are the caller's: a checkpoint around the call would count ours among its own. The innermost pair acts.
    What runs on the CPU runs in one thread: trials are small, and the other cores compile kernels meanwhile, so that threads would
    wait for one another.
    """
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with disable_current_modes(), torch.inference_mode(False), torch.enable_grad(), hooks:
            yield
    finally:
        torch.set_num_threads(threads)


def _judge(trials: Iterable[Trying], mode: str) -> Verdict:
    worst = 0.0
    try:
        for trial in trials:
            for rows in ROWS if mode == "full" else ROWS[:1]:
                for scale in SCALES:
                    worst = max(worst, _worst(trial, scale, rows))
    except ValidationError as failure:
        return Verdict(None, str(failure))
    return Verdict(worst)


def _trials(site: SiteGraph, program: Program, device: torch.device, mode: str) -> Iterator[Trial]:
    """The site in the model's dtypes and, where these are narrow, in float32, whose small errors show small faults."""
    rows = {} if mode == "full" else {"most_rows": FEW_ROWS}
    yield Trial(site, program, device, {}, **rows)
    wide = program.retyped({"float16": "float32", "bfloat16": "float32"})
    if wide != program:
        to_float = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
        yield Trial(site, wide, device if mode == "full" else torch.device("cpu"), to_float, **rows)


def _worst(trial: Trying, scale: float, rows: int) -> float:
    """The worst ratio of a trial; an error says which result is too far off."""
    worst, unlucky = 0.0, []
    for result, ratio in _ratios(list(trial.run(scale, rows)), scale):
        if not ratio <= LIMITS[result.ours.dtype] and result.truth.numel() <= FEW and isinstance(trial, Trial):
            unlucky.append(result.name)
        else:
            worst = max(worst, _within(ratio, result, scale))
    if unlucky and isinstance(trial, Trial):
        for result, ratio in _ratios(list(_over_draws(trial, scale, rows, unlucky)), scale):
            worst = max(worst, _within(ratio, result, scale))
    return worst


def _over_draws(trial: Trial, scale: float, rows: int, names: Collection[str]) -> Iterator[Compared]:
    """Results of a few numbers each, those of all draws together."""
    drawn = [result for seed in SEEDS for result in replace(trial, seed=seed).run(scale, rows)]
    for name in names:
        found = [result[1:] for result in drawn if result.name == name]
        yield Compared(name, *(torch.cat([tensor.reshape(-1) for tensor in tensors]) for tensors in zip(*found, strict=True)))


def _ratios(results: Sequence[Compared], scale: float) -> Iterator[tuple[Compared, float]]:
    """Each result with its ratio."""
    for name, ours, eager, truth in results:
        if ours.shape != truth.shape or ours.dtype != eager.dtype:
            raise ValidationError(f"at input scale {scale:g} {name} is {ours.dtype} {tuple(ours.shape)}, eager's is {eager.dtype} "
                                  f"{tuple(truth.shape)}")
    measures: list[Closeness] = closeness([result[1:] for result in results])
    for result, measure in zip(results, measures, strict=True):
        if not measure.overflows_alike:
            raise ValidationError(f"at input scale {scale:g} {result.name} is infinite or NaN in other places than eager's")
        yield result, measure.ratio(result.ours.dtype, result.truth.numel())


def _within(ratio: float, result: Compared, scale: float) -> float:
    limit = LIMITS[result.ours.dtype]
    if not ratio <= limit:
        raise ValidationError(f"at input scale {scale:g} {result.name} is {ratio:.3g} times as far from float64 as eager's, "
                              f"{limit:g} is the limit")
    return ratio
