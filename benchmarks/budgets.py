"""fxfuse at one memory budget after another, in one process: what is compiled for one budget is there for the next.

Weights and optimizer begin anew with every budget, and the peak of memory is counted anew; `first_step_s` is that of a cold process
for the first budget alone, which `budgets_before` tells.
"""

from __future__ import annotations

import gc
import time
from typing import Any

import torch

from benchmarks import peers
from benchmarks.jobs import Job
from benchmarks.training_steps import GIB, Training
from benchmarks.workloads import Workload, draw_adapters, draw_base

NONE = object()  # a contender that was given no budget


def columns(budget: Any, job: Job) -> dict[str, Any]:
    """Of the rows at one of a contender's budgets."""
    return dict(contender=job.contender.at(budget), memory=budget, budgets_before=job.contender.budgets.index(budget))


def apply(budget: Any, prepared: peers.Prepared, job: Job) -> None:
    """Give the model this budget, as if it were the first."""
    import fxfuse

    model = fxfuse.restore(prepared.model)
    begin_again(model, job.workload)
    start = time.perf_counter()
    prepared.model = fxfuse.optimize(model, memory=budget, **job.contender.arguments)
    prepared.optimize_s = time.perf_counter() - start


def begin_again(model: torch.nn.Module, workload: Workload) -> None:
    """The weights that every contender starts from, no gradients, and no memory held that is free."""
    model.zero_grad(set_to_none=True)
    if workload.mode == "full":
        draw_base(model, workload)
    else:
        draw_adapters(model)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def planned(training: Training) -> dict[str, Any]:
    """What the plan of the run that was measured says."""
    import fxfuse

    plan = getattr(fxfuse.report(training.model), "memory", None)
    if plan is None:
        return {}
    return dict(
        predicted_gib=round(plan.predicted_peak / GIB, 6),
        points=dict(plan.points()),
        parts_gib={name: round(size / GIB, 6) for name, size in plan.parts.items()},
        plan_notes=[str(note)[:300] for note in plan.notes],
    )
