"""A graph of fused ops and remainder becomes a callable: AOTAutograd splits it, the memory plan decides what is saved.

    Dynamo graph of functional fused ops
        -> joint graph                      AOTAutograd
        -> recompute cheap outputs, tags    memory/
        -> forward and backward graphs      AOTAutograd's min-cut partitioner
        -> products, merge, bufferize       nothing is traced after this

With ``remainder="inductor"`` Inductor compiles what lies around the fused ops, which stay opaque to it. It gets the same
recomputation; what it keeps of its own part it decides itself, because it does fuse what it recomputes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import fx

from ._torch import (
    TracingContext,
    aot_autograd,
    functorch_config,
    fx_graph_cse,
    make_graph_module,
    min_cut_partition,
)
from .bufferize import boxed, bufferize, drop_unread_outputs
from .capture.context import current_call, leaves_only_its_result, outputs_are_unread, replayed_without
from .cuda_graphs import (
    Both,
    CheckpointRecorder,
    Gauge,
    Pair,
    checkpoints,
    is_kept_apart,
    recorded,
    why_unfit,
)
from .earlier_traces import remembered
from .memory.absorb import absorb_sums
from .memory.equal_outputs import share_equal_outputs
from .memory.keeping import keep_outputs
from .memory.merge import merge_recomputed
from .memory.offload import offload_saved
from .memory.recompute import recompute_cheap_outputs
from .memory.splits import apply_choice
from .memory.surveys import choice_for
from .memory.tags import tag_as_eager, tag_dequantized
from .memory.tidy import cancel_views
from .memory.tiles.planned import tile_as_planned
from .memory.unread import without_outputs
from .products.accumulation import keep_streams
from .products.arrange import Rules, arrange_products, forget_pending, leave_products
from .products.splitting import widen_again
from .products.transposes import cancel_transposes
from .reporting.records import GraphRecord
from .reuse import mark_donated

Compiled = Callable[..., Any]

# donated_buffer: AOTAutograd would give saved tensors to the backward for reuse, and then refuse ``retain_graph``.
# cse: the partitioner would find a recomputed op equal to the one it repeats and undo it; we do it before the plan.
_SETTINGS = {"donated_buffer": False, "cse": False}


def compile_eager(gm: fx.GraphModule, example_inputs: Sequence[Any], record: GraphRecord, plan: str,
                  rules: Rules, cuda_graphs: bool | str = False) -> Compiled:
    """The remainder runs as generated Python over ATen ops. ``cuda_graphs``: that of blocks is recorded once it has run."""
    pair = None
    if cuda_graphs and record.kind == "block" and plan in ("none", "save"):
        pair = Pair(record, Gauge() if cuda_graphs == "auto" else None)
    compiler = aot_autograd(
        fw_compiler=partial(_finish_forward, record=record, rules=rules, plan=plan, pair=pair),
        bw_compiler=partial(_finish_backward, record=record, rules=rules, plan=plan, pair=pair),
        inference_compiler=partial(_finish_without_gradients, record=record, rules=rules),
        partition_fn=partial(partition, plan=plan, record=record, pair=pair),
    )
    with functorch_config.patch(_SETTINGS), remembered(gm):
        compiled = compiler(gm, example_inputs)
    _donate_nothing()
    return compiled


def compile_inductor(gm: fx.GraphModule, example_inputs: Sequence[Any], record: GraphRecord, plan: str,
                     rules: Rules) -> Compiled:
    """The remainder is compiled by Inductor; the fused ops are planned by us."""
    # Inductor takes seconds to import; only this path pays them.
    from .inductor_remainder import compile_with_inductor

    record.forward_source = record.backward_source = "compiled by Inductor"
    leave_products(record, "Inductor compiles this graph's matmuls")
    with functorch_config.patch(_SETTINGS):
        compiled = compile_with_inductor(gm, example_inputs, plan)
    _donate_nothing()
    return compiled


def partition(joint: fx.GraphModule, joint_inputs: Any, *, num_fwd_outputs: int, plan: str, record: GraphRecord | None = None,
              remainder_is_fused: bool = False, pair: Pair | None = None, **kwargs: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
    """AOTAutograd's partitioner, told what to save. ``kwargs`` differ between versions of torch and are passed on.

    plan: ``none`` (no budget: save as eager, less the cheap outputs), ``save`` (all that eager saves), or under a budget the text of
    a choice (memory/plan.py), for which the graph is surveyed as well.
    """
    if pair is not None:
        pair.returned = num_fwd_outputs
    tag_plain(joint, num_fwd_outputs, plan, remainder_is_fused)
    if not remainder_is_fused:
        choice = choice_for(joint.graph, num_fwd_outputs, plan, record)
        keep_outputs(joint.graph, choice.keep)
        if choice.recompute or choice.offload:
            apply_choice(joint.graph, num_fwd_outputs, choice.recompute, choice.offload)
    forward, backward = min_cut_partition(joint, joint_inputs, num_fwd_outputs=num_fwd_outputs, **kwargs)
    backward = make_graph_module(backward, backward.graph)  # (under Dynamo: not compiled anew by each pass that follows)
    merge_recomputed(backward)
    absorb_sums(backward)
    mark_donated(forward, backward, num_fwd_outputs)
    offload_saved(forward, backward, num_fwd_outputs)
    return forward, backward


def tag_plain(joint: fx.GraphModule, num_fwd_outputs: int, plan: str = "none", remainder_is_fused: bool = False) -> None:
    """A joint graph is tidied and tagged as it is without a budget: what a choice starts from."""
    tidy(joint, num_fwd_outputs)
    if plan != "save":
        recompute_cheap_outputs(joint, num_fwd_outputs)
    tag_dequantized(joint)
    if not remainder_is_fused:
        tag_as_eager(joint, num_fwd_outputs)


def tidy(gm: fx.GraphModule, num_fwd_outputs: int) -> None:
    """What a graph says twice or undoes again is taken out, in place."""
    cancel_transposes(gm, num_fwd_outputs)
    cancel_views(gm, num_fwd_outputs)
    share_equal_outputs(gm)
    gm.graph = fx_graph_cse(gm.graph)
    widen_again(gm, num_fwd_outputs)


def _finish_forward(gm: fx.GraphModule, example_inputs: Sequence[Any], *, record: GraphRecord, rules: Rules, plan: str,
                    pair: Pair | None = None) -> Compiled:
    """The forward of a training graph; beside it, made when first asked for, what a checkpoint needs of it in the backward."""
    leaves_nothing_else = leaves_only_its_result()
    part = without_outputs(gm, _own_outputs()) if leaves_nothing_else else None
    results: Any = gm.graph.output_node().args[0]
    inputs = len(gm.graph.find_nodes(op="placeholder"))
    unfit = "" if pair is None else why_unfit(gm.graph)
    run = plain = _finish(gm, example_inputs, record=record, rules=rules, direction="forward", plan=plan)
    if pair is not None:
        run = recorded(plain, pair, "forward", unfit)
    if part is None and (pair is None or not leaves_nothing_else):
        return run

    @cache
    def replay() -> Compiled:
        if part is None:
            return plain
        drop_unread_outputs(part.gm)
        _arrange(part.gm, GraphRecord(record.kind), rules, plan)
        bufferize(part.gm)
        return boxed(part.gm)

    checkpoint = None
    if pair is not None and checkpoints.RECORDED and not any(map(is_kept_apart, results)):
        both = Both(lambda arguments: replay()(arguments), [str(result) for result in results], inputs)
        checkpoint = pair.checkpoint = CheckpointRecorder(pair, both, plain, unfit)

    def choose(arguments: list) -> list:
        if not outputs_are_unread():
            return run(arguments)
        if part is not None:
            replayed_without(current_call(), str(part))
        put_off = None if checkpoint is None else checkpoint.second(arguments)
        return replay()(arguments) if put_off is None else put_off

    choose._boxed_call = True  # type: ignore[attr-defined]
    return choose


def _finish_backward(gm: fx.GraphModule, example_inputs: Sequence[Any], *, record: GraphRecord, rules: Rules, plan: str,
                     pair: Pair | None = None) -> Compiled:
    """The backward of a training graph."""
    taken_as = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    unfit = "" if pair is None else why_unfit(gm.graph)
    run = _finish(gm, example_inputs, record=record, rules=rules, direction="backward", plan=plan)
    if pair is None:
        return run
    if pair.checkpoint is not None and not unfit:
        pair.checkpoint.both.follow_with(run, taken_as)
    return recorded(run, pair, "backward", unfit)


def _finish_without_gradients(gm: fx.GraphModule, example_inputs: Sequence[Any], *, record: GraphRecord, rules: Rules) -> Compiled:
    """A graph that has no backward, tidied and arranged as a forward is: where training is compared with it, both round alike."""
    tidy(gm, len(gm.graph.output_node().args[0]))  # type: ignore[arg-type]
    drop_unread_outputs(gm)
    keep_streams(gm.graph)
    run = _finish(gm, example_inputs, record=record, rules=rules, direction="forward")
    forget_pending(record)
    return run


def _own_outputs() -> list[int]:
    """Positions among the forward's outputs of those that are tensors of their own: no input, mutated or not, no view of anything."""
    context = TracingContext.try_get()
    facts = None if context is None else context.fw_metadata
    if facts is None or facts.tokens:
        return []
    return [facts.num_mutated_inp_runtime_indices + i for i, output in enumerate(facts.output_info)
            if output.output_type.name in ("non_alias", "unsafe_view_alias")]


def _finish(gm: fx.GraphModule, example_inputs: Sequence[Any], *, record: GraphRecord, rules: Rules, direction: str,
            plan: str = "none") -> Compiled:
    drop_unread_outputs(gm)
    tiles = _arrange(gm, record, rules, plan, backward=direction == "backward")
    if direction == "backward":
        leave_products(record, "the gradients that they give their input are not added up here")
    bufferize(gm)
    run = boxed(gm)
    setattr(record, f"{direction}_source", gm.code + tiles)
    return run


def _arrange(gm: fx.GraphModule, record: GraphRecord, rules: Rules, plan: str, *, backward: bool = False) -> str:
    """The matmuls of a partitioned graph; and its wide parts in tiles, where the plan says so or that is free. Returns their code."""
    if _rounds_alike(plan):
        leave_products(record, "torch.use_deterministic_algorithms is on, and sums are to be rounded alike under every memory plan")
        return ""
    arrange_products(gm, record, rules)
    return tile_as_planned(gm, record, plan, backward=backward, strict=rules.strict)


def _rounds_alike(plan: str) -> bool:
    """Must gradients be the same bits under every plan. What can be accumulated or shared depends on what is saved."""
    return plan not in ("none", "save") and torch.are_deterministic_algorithms_enabled()


def _donate_nothing() -> None:
    """Say that no saved tensor is donated: with the setting alone, torch 2.13 takes "unknown" for "some"."""
    context = TracingContext.try_get()
    if context is not None and context.fw_metadata is not None:
        context.fw_metadata.bw_donated_idxs = []
