"""A recomputed forward and its adjoint, which read the same tensors, become one fused op in the backward graph.

The gate's product is needed for the gradient of the down projection, the derivative of the gate for that of its operands;
both read ``gate`` and ``up``. As one op they read them once.
"""

from __future__ import annotations

import operator

from torch import fx

from ..fused_op import rows
from ..surgery import sort_topologically
from .joint import bytes_of, depends, is_rows, outputs_of, program_of
from .recompute import RECOMPUTED
from .restriction import merged


def merge_recomputed(backward: fx.GraphModule) -> int:
    """Merge every recomputed fused op with one that reads the same large tensors; returns how many were."""
    graph = backward.graph
    count = 0
    merged_away: set[fx.Node] = set()
    for node in [n for n in graph.nodes if is_rows(n) and RECOMPUTED in n.meta]:
        if node in merged_away:
            continue
        for partner in [n for n in graph.nodes if is_rows(n) and n is not node]:
            if _share_large_operand(node, partner) and not depends(node, partner) and not depends(partner, node):
                if _merge(node, partner):
                    count += 1
                    merged_away |= {node, partner}
                    break
    if count:
        sort_topologically(graph)
        graph.lint()
        backward.recompile()
    return count


def _share_large_operand(a: fx.Node, b: fx.Node) -> bool:
    largest = max(map(bytes_of, a.args[0]))
    return any(operand in b.args[0] and bytes_of(operand) == largest for operand in a.args[0])


def _merge(recomputed: fx.Node, adjoint: fx.Node) -> bool:
    """Replace both by one op, at the adjoint's place. False if their programs do not fit together."""
    first, second = program_of(recomputed), program_of(adjoint)
    operands = dict(zip((a.name for a in first.arguments), recomputed.args[0], strict=True))
    for argument, operand in zip(second.arguments, adjoint.args[0], strict=True):
        if operands.setdefault(argument.name, operand) is not operand:
            return False
    union = merged(first, second)
    if union is None:
        return False
    graph = adjoint.graph
    with graph.inserting_before(adjoint):
        op = graph.call_function(rows, ([operands[a.name] for a in union.arguments], str(union)))
    op.meta = dict(adjoint.meta)
    op.meta["val"] = [*recomputed.meta["val"], *adjoint.meta["val"]]
    for source, offset in ((recomputed, 0), (adjoint, len(first.outputs))):
        for index, output in outputs_of(source).items():
            with graph.inserting_after(op):
                fresh = graph.call_function(operator.getitem, (op, offset + index))
            fresh.meta = dict(output.meta)
            output.replace_all_uses_with(fresh)
            graph.erase_node(output)
        graph.erase_node(source)
    return True
