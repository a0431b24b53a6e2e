"""The rules of the representation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..functions import FUNCTIONS
from .parts import REDUCTIONS, STRUCTURAL, Argument, Lane, Output, ProgramError

if TYPE_CHECKING:
    from .whole import Program


def verify(program: Program) -> None:
    axes = dict(program.axes)
    for i, node in enumerate(program.nodes):
        where = f"%{i} = {node}"
        if any(operand >= i or operand < 0 for operand in node.operands):
            raise ProgramError(f"{where}: uses a value that is not defined before it")
        if node.op in FUNCTIONS:
            if len(node.operands) != FUNCTIONS[node.op].arity:
                raise ProgramError(f"{where}: {node.op} takes {FUNCTIONS[node.op].arity} operands")
        elif node.op in REDUCTIONS:
            if program.extents[node.operands[0]].axis != node.attributes[0]:
                raise ProgramError(
                    f"{where}: reduces axis {node.attributes[0]!r} of a value that does not vary over it"
                )
        elif node.op not in STRUCTURAL:
            raise ProgramError(f"{where}: unknown operation {node.op!r}")
    _ = program.kinds, program.extents
    for argument in program.arguments:
        _verify_lanes(argument, [program.nodes[i].attributes[1] for i in program.loads(argument.name)], axes)
    for output in program.outputs:
        _verify_lanes(output, [lane for _, lane in output.stores], axes)
        for value, lane in output.stores:
            if lane is not None and program.extents[value].axis not in (None, lane.axis):
                raise ProgramError(f"output {output.name}: %{value} does not vary over axis {lane.axis!r}")
            if lane is None and program.extents[value].axis is not None:
                raise ProgramError(f"output {output.name}: %{value} has columns, the output has none")


def _verify_lanes(tensor: Argument | Output, lanes: list[Lane | None], axes: dict[str, int | None]) -> None:
    """Lanes of one tensor are equal or disjoint, and lie inside its columns."""
    if len(tensor.rows) != 0 and not all(isinstance(flag, bool) for flag in tensor.rows):
        raise ProgramError(f"{tensor.name}: row flags must be bool")
    claimed: dict[int, Lane] = {}
    for lane in lanes:
        if (lane is None) != (tensor.columns is None):
            raise ProgramError(f"{tensor.name}: a tensor has columns exactly if it is accessed through lanes")
        if lane is None:
            continue
        if isinstance(tensor.columns, str):
            if lane != Lane(tensor.columns):
                raise ProgramError(
                    f"{tensor.name}: covered by axis {tensor.columns!r} but accessed at {lane}"
                )
            continue
        width = axes[lane.axis]
        if width is None or tensor.columns is None:
            raise ProgramError(f"{tensor.name}: the lane {lane} needs a static width")
        for column in range(lane.offset, lane.offset + lane.stride * width, lane.stride):
            if column >= tensor.columns or claimed.setdefault(column, lane) != lane:
                raise ProgramError(
                    f"{tensor.name}: lane {lane} leaves the tensor or overlaps {claimed.get(column)}"
                )
