"""May the op stand in for a linear and its loss: compared with float64 like any site, outputs and every gradient at three scales."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ..canonical.facts import known_shape, static_size
from ..site_bytes import kept_by
from ..validation import Verdict, judged
from .match import LinearLoss
from .site import ELEMENTS, ROWS, LossSite, LossTrial
from .surgery import Plan


def check(found: LinearLoss, plan: Plan, device: torch.device, mode: str) -> Verdict:
    """The verdict on a plan, found once for equal sites."""
    if mode == "off":
        return Verdict()
    classes = static_size(known_shape(found.linear)[-1]) or 1
    site = LossSite(found, plan, rows=min(ROWS, max(16, ELEMENTS // classes)) if device.type == "cuda" else ROWS)
    key = ("linear_loss", plan.mode, str(plan.program), site.text())
    return judged(key, partial(_trials, site, plan, device, mode), device, mode)


def kept(found: LinearLoss, plan: Plan) -> tuple[int, int]:
    """Bytes kept for the backward beyond inputs and outputs: (the model's own code, the op)."""
    if not plan.wanted:
        return 0, 0
    site = LossSite(found, plan)
    return kept_by(site, plan.program, "linear_loss", plan.mode)


def _trials(site: LossSite, plan: Plan, device: torch.device, mode: str) -> Iterator[LossTrial]:
    """In the model's dtypes on the device and, where these are narrow, in float32, whose small errors show small faults."""
    yield LossTrial(site, site.narrowed(plan.program, device), device, {})
    wide = plan.program.retyped({"float16": "float32", "bfloat16": "float32"})
    if wide != plan.program:
        elsewhere = device if mode == "full" else torch.device("cpu")
        to_float = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
        yield LossTrial(site, site.narrowed(wide, elsewhere), elsewhere, to_float)
