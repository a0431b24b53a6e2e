"""What the rules that stand around matmuls have in common: what they are told, and how a site is checked, replaced and recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import fx

from ._torch import FakeTensor
from .canonical.facts import known_tensor
from .regions import Region
from .regions.layout import Layout
from .regions.region import ArgumentView
from .reporting.records import Site
from .validation import Verdict

P = TypeVar("P")
KEPT = ("nn_module_stack", "stack_trace", "source_fn_stack", "seq_nr", "custom")  # where a node comes from


@dataclass(frozen=True)
class Wishes:
    """use: for the name of a rule, why it is not used, or nothing; foreign: for a region, why its tensors cannot go into a kernel;
    lazy_outputs: may outputs be given up for a ``LazyOutput``; validate, strict, tell: as for every rule."""

    use: Callable[[str], str]
    foreign: Callable[[Region], str]
    validate: str
    strict: bool
    tell: Callable[[str, Exception | None], None]
    lazy_outputs: bool = False


def attempt(site: Site, wishes: Wishes, plan: Callable[[], P], judge: Callable[[P], Verdict], put: Callable[[P], None]) -> None:
    """Replace a site by a plan that its judge lets pass, or say in it why not. An internal error declines it (raised when strict)."""

    def left(error: Exception | None = None) -> None:
        wishes.tell(f"{site.rule} at {site.module or 'the top'} was left as it was: {site.reason}", error)

    try:
        planned = plan()
        verdict = judge(planned)
        site.reason, site.error_ratio = verdict.reason, verdict.error_ratio
        if site.reason:
            return left()
        put(planned)
    except Exception as error:
        if wishes.strict:
            raise
        site.reason = f"internal error: {type(error).__name__}: {error}"
        return left(error)
    site.status = "fused"


def with_operands(region: Region, operands: Iterable[fx.Node]) -> Region:
    """A region with the operands of the matmuls beside it among what it reads."""
    return replace(region, arguments=[*(ArgumentView(node, Layout(()), 0) for node in operands), *region.arguments])


def describe(anchor: fx.Node, like: fx.Node) -> None:
    """What an op gives, as facts for later readers of the graph; it comes from where ``like`` does."""
    anchor.meta = {key: value for key, value in like.meta.items() if key in KEPT}
    arguments = fx.map_arg(anchor.args, lambda node: known_tensor(node))
    first = arguments[0]
    with first.fake_mode if isinstance(first, FakeTensor) else nullcontext(), torch.no_grad():
        anchor.meta["example_value"] = anchor.target(*arguments)  # type: ignore[operator]
