"""One graph in, the same graph with fused ops out: regions found, named, checked and replaced, each with its record."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, fx

from .anchored import Wishes
from .attention.causal import use_causal_kernels
from .attention.fuse import fuse_attention
from .canonical import canonicalize
from .canonical.autocast import write_operand_casts
from .canonical.facts import is_plain, known_tensor, tensor_of
from .canonical.splits import restore_splits
from .cost_gate import faster_elsewhere
from .linear_loss.fuse import fuse_linear_losses
from .lowering import implementation_on, rehearsal
from .naming import name_of
from .products.shared import shared_inputs
from .products.thin_sums import rewrite_products
from .program import Program
from .quantized_linears import fuse_quantized_linears
from .regions import Declined, Region, find_regions
from .reporting.records import Site
from .residuals import plan_residuals
from .row_selection.match import select_rows
from .row_selection.weights import weigh_before_products
from .site_bytes import saved_bytes
from .surgery import erase_dead, replace_region, sort_topologically
from .validation import rehearse, validate
from .written_derivatives import derive_written_backwards

logger = logging.getLogger("fxfuse")

# Higher-order ops whose body is a graph like any other: what is inside is fused too.
_WITH_BODY = ("tag_activation_checkpoint",)


@dataclass(frozen=True)
class Options:
    """What may be fused, and how it is checked.

    use: for the name of a rule, why it is not used, or nothing
    all_differentiable: gradients may be asked of every input, whatever the example inputs say
    """

    use: Callable[[str], str]
    validate: str = "fast"
    strict: bool = False
    all_differentiable: bool = False
    lazy_outputs: bool = False  # an output that only a fused loss needed may be given up for a LazyOutput (linear_loss/)
    gated: bool = True  # leave sites to what was measured faster


def rewrite_graph(gm: fx.GraphModule, options: Options) -> list[Site]:
    """Replace what can be replaced, in place; returns what was found. The result holds functional fused ops."""
    sites: list[Site] = []
    for body in _bodies(gm):
        sites += rewrite_graph(body, options)
    sites += fuse_quantized_linears(gm, options.use, options.validate)
    sites += derive_written_backwards(gm)
    canonicalize(gm)
    write_operand_casts(gm)
    differentiable_now = partial(differentiable_nodes, gm.graph, options.all_differentiable)
    sites += weigh_before_products(gm, differentiable_now, options.use)
    sites += select_rows(gm, differentiable_now, options.use)
    sites += rewrite_products(gm, options.use, options.validate, options.strict)
    sites += shared_inputs(gm.graph, differentiable_nodes(gm.graph, options.all_differentiable), options.use)
    wishes = Wishes(options.use, foreign_reason, options.validate, options.strict, tell, options.lazy_outputs)
    sites += fuse_linear_losses(gm, differentiable_now, wishes)
    sites += use_causal_kernels(gm, options.use, options.validate)
    sites += fuse_attention(gm, differentiable_now, wishes)
    regions, declined = find_regions(gm)
    sites += [_declined_site(site) for site in declined]
    differentiable = differentiable_nodes(gm.graph, options.all_differentiable)
    moved: dict[fx.Node, fx.Node] = {}
    _rehearse(regions, differentiable, options)
    for region in regions:
        # What earlier surgery replaced is looked up: a region may read another's output.
        current = replace(region, arguments=[replace(view, node=moved.get(view.node, view.node)) for view in region.arguments])
        sites.append(_fuse_site(gm, current, differentiable, moved, options))
        differentiable |= {new for old, new in moved.items() if old in differentiable}
    if any(site.status == "fused" for site in sites):
        sort_topologically(gm.graph)
        erase_dead(gm.graph)
        restore_splits(gm)
        gm.graph.lint()
    gm.recompile()
    return sites


def _bodies(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    for node in gm.graph.nodes:
        if node.op == "call_function" and getattr(node.target, "_name", "") in _WITH_BODY:
            for argument in node.args:
                if isinstance(argument, fx.Node) and argument.op == "get_attr":
                    body = gm.get_submodule(str(argument.target))
                    if isinstance(body, fx.GraphModule):
                        yield body


def differentiable_nodes(graph: fx.Graph, all_inputs: bool = False) -> set[fx.Node]:
    """The nodes whose gradient can be asked for: they depend on an input that requires one, or (``all_inputs``) could."""
    found: set[fx.Node] = set()
    if not torch.is_grad_enabled() and not all_inputs:
        return found
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            tensor = tensor_of(node)
            if tensor is not None and tensor.is_floating_point() and (tensor.requires_grad or all_inputs):
                found.add(node)
        elif any(operand in found for operand in node.all_input_nodes):
            found.add(node)
    return found


def _fuse_site(gm: fx.GraphModule, region: Region, differentiable: Collection[fx.Node], moved: dict[fx.Node, fx.Node],
               options: Options) -> Site:
    """Replace one region, or say why not. An internal error declines the site (and is raised when strict)."""
    site = Site("unnamed", region.module, "declined", program=str(region.program))
    try:
        site.rule, site.near_miss = name_of(region.program)
        site.reason = options.use(site.rule) or foreign_reason(region)
        if site.reason:
            return site
        device = known_tensor(region.arguments[0].node).device
        faster = faster_elsewhere(site.rule, device) if options.gated else None
        if faster is not None:
            site.status, site.implementation, site.reason = "served", faster.implementation, str(faster)
            return site
        wanted, program = _planned(region, differentiable)
        verdict = validate(region, program, differentiable, device, options.validate)
        site.reason, site.error_ratio = verdict.reason, verdict.error_ratio
        if site.reason:
            tell(f"{site.rule} at {region.module or 'the top'} was left as it was: {site.reason}")
            return site
        site.saved_bytes_before, site.saved_bytes_after = saved_bytes(region, program, wanted)
        moved.update(replace_region(gm.graph, region, program))
    except Exception as error:
        if options.strict:
            raise
        site.reason = f"internal error: {type(error).__name__}: {error}"
        tell(f"{site.rule} at {region.module or 'the top'} was left as it was: {site.reason}", error)
        return site
    site.status, site.implementation, site.program = "fused", implementation_on(device.type), str(program)
    return site


def _planned(region: Region, differentiable: Collection[fx.Node]) -> tuple[tuple[str, ...], Program]:
    """The arguments whose gradient can be asked for, and the program with what it then saves."""
    wanted = tuple(argument.name for view, argument in zip(region.arguments, region.program.arguments, strict=True)
                   if view.node in differentiable and argument.kind == "real")
    return wanted, plan_residuals(region.program, wanted) if wanted else region.program


def _rehearse(regions: Sequence[Region], differentiable: Collection[fx.Node], options: Options) -> None:
    """Let the kernels that validation will run be compiled side by side. What fails here fails again there, and is told there."""
    with rehearsal() as useful:
        for region in regions if useful and options.validate != "off" else ():
            try:
                if not foreign_reason(region):
                    _, program = _planned(region, differentiable)
                    rehearse(region, program, differentiable, known_tensor(region.arguments[0].node).device, options.validate)
            except Exception as error:
                logger.debug("a site of %s was not rehearsed: %s", region.module or "the top", error)


_told: set[str] = set()


def tell(line: str, error: Exception | None = None) -> None:
    """Log a decline that nobody asked for, once: a model has many equal layers."""
    if line not in _told:
        _told.add(line)
        logger.warning("%s", line, exc_info=error)


def foreign_reason(region: Region) -> str:
    """Why a region's tensors cannot go into a kernel, or nothing."""
    devices = set()
    for view in region.arguments:
        tensor = known_tensor(view.node)
        if not is_plain(tensor) or tensor.layout != torch.strided:
            return f"{view.node.name} is a {type(tensor).__name__}, whose operations are its own; fused ops take plain tensors"
        if not (tensor.dim() == 0 and tensor.device.type == "cpu"):
            devices.add(tensor.device)
    if len(devices) > 1:
        return f"its tensors are on several devices ({', '.join(sorted(map(str, devices)))})"
    if devices and next(iter(devices)).type not in ("cpu", "cuda"):
        return f"there is no lowering for the device {next(iter(devices))}; the CPU and CUDA (or ROCm) have one"
    return ""


def _declined_site(site: Declined) -> Site:
    return Site(site.rule or "unnamed", site.module, "declined", site.reason)


def example_device(gm: fx.GraphModule) -> torch.device | None:
    """The device of a graph's first tensor input."""
    for node in gm.graph.nodes:
        if node.op == "placeholder" and isinstance(tensor := tensor_of(node), Tensor):
            return tensor.device
    return None
