"""Outputs of a fused op that are one value are one output.

A norm that several matmuls read under autocast has a 16-bit output for each of them. They are told apart until autograd has run,
so that each has a gradient of its own and these are added in the math dtype; after that one of them is enough.
"""

from __future__ import annotations

from torch import fx

from .joint import is_rows, outputs_of, program_of, views_of


def share_equal_outputs(joint: fx.GraphModule) -> int:
    """In place; returns how many outputs are now read by nobody. What the graph returns stays a tensor of its own."""
    count = 0
    nodes = set(joint.graph.nodes)
    for node in [n for n in joint.graph.nodes if is_rows(n) and len(n.users) > 1]:
        program, first = program_of(node), {}
        for index, output in sorted(outputs_of(node).items()):
            declared = program.outputs[index]
            value = (declared.dtype, declared.rows, declared.columns, declared.stores)
            if value not in first:
                first[value] = output
            elif not any(user.op == "output" for alias in views_of(output, nodes) for user in alias.users):
                output.replace_all_uses_with(first[value])
                joint.graph.erase_node(output)
                count += 1
    return count
