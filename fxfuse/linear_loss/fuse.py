"""The rule ``linear_loss`` on a graph: found, checked, replaced, each site with its record."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

from torch import fx

from ..anchored import Wishes, attempt, with_operands
from ..canonical.facts import known_tensor
from ..compile_ahead import compile_launches_ahead
from ..lowering import implementation_on
from ..regions import find_regions
from ..reporting.records import Site
from ..surgery import erase_dead, sort_topologically
from ..validation import Verdict
from .checking import check, kept
from .match import LinearLoss, NotFused, find_linear_losses
from .prepare import prepare
from .products import LINEARS
from .site import LossSite
from .surgery import Plan, give_up_outputs, plan_of, replace_linear_loss

RULE = "linear_loss"


def fuse_linear_losses(gm: fx.GraphModule, differentiable: Callable[[], Collection[fx.Node]], wishes: Wishes) -> list[Site]:
    """Replace every linear that ends in a loss, in place; what is not replaced is left to the rules for regions."""
    if not any(node.op == "call_function" and node.target in LINEARS for node in gm.graph.nodes):
        return []
    reason = wishes.use(RULE)
    sites: list[Site] = []
    if not reason:
        prepare(gm)
    for _ in range(sum(node.target in LINEARS for node in gm.graph.nodes)):
        known = differentiable()
        found = list(find_linear_losses(gm, find_regions(gm)[0], known, wishes.lazy_outputs))
        declined = [_declined(site) if isinstance(site, NotFused) else _site(site, reason) for site in found]
        chosen = next((site for site in found if isinstance(site, LinearLoss)), None)
        if chosen is None or reason:
            return sites + declined
        site = _fuse(gm, chosen, known, wishes)
        sites.append(site)
        if site.status != "fused":
            return sites
    return sites


def _fuse(gm: fx.GraphModule, found: LinearLoss, differentiable: Collection[fx.Node], wishes: Wishes) -> Site:
    """Replace one, or say why not."""
    site = _site(found, wishes.foreign(with_operands(found.region, found.operands.values())))
    if site.reason:
        return site
    device = known_tensor(found.hidden).device

    def judge(plan: Plan) -> Verdict:
        if implementation_on(device.type) == "triton":
            compile_launches_ahead(LossSite(found, plan).fused(plan.program).graph)
        return check(found, plan, device, wishes.validate)

    def put(plan: Plan) -> None:
        site.saved_bytes_before, site.saved_bytes_after = kept(found, plan)
        if found.lazy:
            give_up_outputs(gm, found.lazy)
        replace_linear_loss(gm.graph, found, plan)
        sort_topologically(gm.graph)
        erase_dead(gm.graph)
        gm.graph.lint()
        site.implementation, site.program = implementation_on(device.type), str(plan.program)

    attempt(site, wishes, partial(plan_of, found, differentiable), judge, put)
    return site


def _site(found: LinearLoss | NotFused, reason: str) -> Site:
    program = found.program if isinstance(found, NotFused) else str(found.program)
    return Site(RULE, found.module, "declined", reason, program=program)


def _declined(site: NotFused) -> Site:
    return Site(RULE, site.module, "declined", site.reason, program=site.program)
