"""The last pass over a partitioned graph: fused ops become direct calls of prepared launchers.

Nothing is traced after this pass, so it may do what tracing could not follow. It runs on the forward, backward and
inference graphs alike; outputs that nobody reads are not computed (row statistics, in an inference graph).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import fx

from ._torch import BoxedCodeGen
from .compile_ahead import compile_launches_ahead
from .direct_calls import with_direct_calls
from .fused_op import rows
from .lowering import launcher
from .memory.joint import is_rows, outputs_of, program_of
from .memory.restriction import restricted
from .pairing import pair_launches
from .products.augmented import rooms_of
from .products.pairs import place_thin_products
from .quantized_op import is_dequantization, launch_directly
from .reuse import plan_reuse
from .sdpa.sites import place_attention
from .small_casts import gather_casts


def bufferize(gm: fx.GraphModule, wanted: Mapping[fx.Node, fx.Node] = MappingProxyType({})) -> int:
    """Replace fused ops by launcher calls, in place; returns how many. ``wanted``: see ``plan_reuse``."""
    drop_unread_outputs(gm)
    count = 2 * pair_launches(gm.graph, _device_of)
    on_gpu = any(_is_on_gpu(node) for node in gm.graph.nodes)
    reuse = plan_reuse(gm.graph, wanted) if wanted else plan_reuse(gm.graph)
    if on_gpu:
        gather_casts(gm.graph)
    for node in gm.graph.nodes:
        if is_rows(node):
            operands, text = node.args
            node.target = launcher(text, _device_of(node))
            node.args = (operands, *reuse.get(node, ()))
            rooms = rooms_of(node)
            if rooms:
                node.kwargs = {"rooms": rooms}
            count += 1
        elif is_dequantization(node):
            launch_directly(node)
    if on_gpu:
        place_thin_products(gm.graph)  # after the reuse was planned, which has to know what these calls are
    place_attention(gm.graph)
    compile_launches_ahead(gm.graph)
    gm.recompile()
    return count


def drop_unread_outputs(gm: fx.GraphModule) -> None:
    """Leave out of every fused op the outputs that nothing reads, and the arguments that only they needed."""
    for node in [n for n in gm.graph.nodes if is_rows(n)]:
        program, read = program_of(node), outputs_of(node)
        if len(read) == len(program.outputs) or not read:
            continue
        names = tuple(program.outputs[index].name for index in sorted(read))
        part = restricted(program, names)
        operands = dict(zip((a.name for a in program.arguments), node.args[0], strict=True))
        with gm.graph.inserting_before(node):
            op = gm.graph.call_function(rows, ([operands[a.name] for a in part.arguments], str(part)))
        op.meta = dict(node.meta)
        op.meta["val"] = [node.meta["val"][index] for index in sorted(read)] if "val" in node.meta else None
        for position, index in enumerate(sorted(read)):
            output = read[index]
            output.args = (op, position)
        gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()


def boxed(gm: fx.GraphModule) -> Callable[[list], list]:
    """The graph as generated Python that takes a list and empties it: an input is freed when it was last read."""
    gm.graph.set_codegen(BoxedCodeGen())
    gm.recompile()
    forward = with_direct_calls(gm).forward

    def run(arguments: list) -> list:
        return forward(arguments)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _is_on_gpu(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor) and node.meta["val"].is_cuda


def _device_of(node: fx.Node) -> str:
    value = node.args[0][0].meta.get("val")
    return value.device.type if isinstance(value, torch.Tensor) else "cpu"
