"""The forward and the backward graph, after the partition: factors into matmuls, shared operands, sums into one buffer. With records.

Nothing is traced after this pass, so its matmuls may write where they are told.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import fx

from ..canonical.facts import module_path
from ..reporting.records import GraphRecord, Site
from ..surgery import sort_topologically
from .accumulation import Sum, accumulate_sums
from .augmented import augment_sums
from .pairs import pair_thin_products
from .scalars import fold_factors
from .shared import RULE as SHARED
from .shared import common_module
from .splitting import split_wide_factors
from .stacking import stack_shared
from .terms import Term

logger = logging.getLogger("fxfuse")

ADAPTED = "lora_linear"


@dataclass(frozen=True)
class Rules:
    """What may be done, and how it is checked.

    use:    for the name of a rule, why it is not used, or nothing
    strict: raise on an internal error, which would otherwise leave the products as they were
    """

    use: Callable[[str], str]
    validate: str = "fast"
    strict: bool = False


def arrange_products(gm: fx.GraphModule, record: GraphRecord, rules: Rules) -> None:
    """Arrange the matmuls of a partitioned graph, in place."""
    work, sites = _copied(gm.graph), list(record.sites)
    try:
        changed = _arrange(work, _Telling(record, rules), rules)
    except Exception as error:
        if rules.strict:
            raise
        line = f"the products of {record.module or 'a graph'} were left as they were: {type(error).__name__}: {error}"
        logger.error("%s", line, exc_info=error)
        record.errors.append(line)
        record.sites[:] = sites
        return
    if changed:
        gm.graph = work
        gm.recompile()


def leave_products(record: GraphRecord, reason: str) -> None:
    """Say of the sites that wait for this pass why nothing came of them."""
    for site in record.sites:
        if site.rule == SHARED and site.status == "pending":
            site.status, site.reason = "declined", reason


def forget_pending(record: GraphRecord) -> None:
    """Sites that wait for a backward that this graph does not have are no sites of it."""
    record.sites[:] = [site for site in record.sites if not (site.rule == SHARED and site.status == "pending")]


def _copied(graph: fx.Graph) -> fx.Graph:
    copy = fx.Graph(tracer_cls=graph._tracer_cls)
    output = copy.graph_copy(graph, {})
    copy.output(output)
    copy.output_node().meta = dict(graph.output_node().meta)
    return copy


def _arrange(graph: fx.Graph, telling: _Telling, rules: Rules) -> int:
    changed = 0 if rules.use(ADAPTED) else split_wide_factors(graph, rules.validate)
    changed += fold_factors(graph)
    if not rules.use(SHARED):
        changed += stack_shared(graph, rules.validate, telling.stacked)
        if changed:
            sort_topologically(graph)
    changed += augment_sums(graph, rules.validate, telling.refusal, telling.augmented)
    changed += accumulate_sums(graph, rules.validate, telling.refusal, telling.summed)
    if not rules.use(ADAPTED):
        sort_topologically(graph)
        graph.eliminate_dead_code()  # thin products that were moved beside a wide one are not paired where they were
        changed += pair_thin_products(graph, rules.validate)
    if changed:
        sort_topologically(graph)
        graph.eliminate_dead_code()
        graph.lint()
    return changed


class _Telling:
    """Sites for the report, from the nodes that were arranged."""

    def __init__(self, record: GraphRecord, rules: Rules) -> None:
        self.record, self.rules = record, rules

    def stacked(self, group: Sequence[Term], reason: str) -> None:
        self._site(SHARED, _common([term.node for term in group]), "stacked", reason)

    def refusal(self, found: Sum) -> str:
        """Why the caller does not want a sum accumulated, or nothing."""
        shared = self.rules.use(SHARED) if len(found.wide) > 1 else ""
        return shared or (self.rules.use(ADAPTED) if found.thin else "")

    def augmented(self, found: Sum, reason: str) -> None:
        self.summed(found, reason, "augmented")

    def summed(self, found: Sum, reason: str, implementation: str = "addmm_") -> None:
        """A wide product and thin ones: one of the sites that were found before. Several wide ones: linears of one input."""
        if len(found.wide) > 1:
            self._site(SHARED, _common([term.node for term in found.wide]), implementation, reason)
        paths = {place_of(term.node) for term in found.terms}
        for site in self.record.sites:
            if site.rule == ADAPTED and site.status == "fused" and site.module in paths and not reason:
                site.implementation = implementation

    def _site(self, rule: str, module: str, implementation: str, reason: str) -> None:
        """One site for a place, whatever is done there forward and backward."""
        known = [site for site in self.record.sites if site.rule == rule and site.module == module]
        if known and (known[0].status == "fused" or (reason and known[0].status == "declined")):
            return
        if known:
            self.record.sites.remove(known[0])
        self.record.sites.append(Site(rule, module, "declined" if reason else "fused", reason, "" if reason else implementation))


def place_of(node: fx.Node) -> str:
    """The module that a node comes from; of a backward node, that whose derivative it is."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return ""
    probe = fx.Graph().placeholder("probe")
    probe.meta["nn_module_stack"] = stack
    return module_path(probe)


def _common(nodes: Sequence[fx.Node]) -> str:
    """The module that all of them are in."""
    return common_module([place_of(node) for node in nodes])
