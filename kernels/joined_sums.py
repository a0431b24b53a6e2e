"""Sums of several lanes of a row as one: ``sum(a) + sum(b) = sum(a + b)``.

A rotary head is two lanes, and the norm before it adds up the sums of both. Each sum along a row costs an exchange between the threads
that hold it; an addition in place costs one instruction. Only sums that nothing else reads, and that are known equally early.
"""

from __future__ import annotations

from dataclasses import replace

from fxfuse.dataflow import Dataflow
from fxfuse.kernels.splitting import only_needed
from fxfuse.program import Program, ProgramBuilder


def with_joined_sums(program: Program) -> Program:
    """The same program, with fewer sums along its rows; itself if none are added up."""
    while added := _added_sums(program):
        builder = ProgramBuilder(program.rank, program.math)
        new: list[int] = []
        for v, node in enumerate(program.nodes):
            if v in added:
                first, second = (new[program.nodes[total].operands[0]] for total in node.operands)
                new.append(builder.reduce("sum", added[v], builder.apply("add", first, second)))
            else:
                new.append(builder.node(replace(node, operands=tuple(new[o] for o in node.operands))))
        outputs = tuple(replace(o, stores=tuple((new[value], lane) for value, lane in o.stores)) for o in program.outputs)
        program = only_needed(replace(program, nodes=tuple(builder.nodes), outputs=outputs)).verify()
    return program


def _added_sums(program: Program) -> dict[int, str]:
    """The additions of two sums along one axis, and that axis."""
    flow = Dataflow(program)
    stored = {value for output in program.outputs for value, _ in output.stores}
    users = {v: [user for user in program.users[v] if user in set(flow.live)] for v in flow.live}

    def only_added(total: int, addition: int) -> bool:
        plain = program.nodes[total].op == "sum" and flow.is_reduction(total) and total not in flow.online
        return plain and total not in stored and users[total] == [addition]

    found: dict[int, str] = {}
    for v in flow.live:
        if program.nodes[v].op == "add" and all(only_added(total, v) for total in program.nodes[v].operands):
            first, second = program.nodes[v].operands
            one, two = program.nodes[first], program.nodes[second]
            alike = program.extents[one.operands[0]] == program.extents[two.operands[0]] and one.attributes == two.attributes
            if first != second and alike and flow.depth[first] == flow.depth[second]:
                found[v] = one.attributes[0]
    return found
