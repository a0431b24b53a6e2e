"""Parts and unions of row programs: what is needed for some of the outputs, and two programs as one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import lru_cache

from ..algebra import append_node
from ..program import Argument, Lane, Output, Program, ProgramBuilder


@lru_cache(maxsize=4096)
def restricted(program: Program, outputs: tuple[str, ...], readable: tuple[str, ...] = ()) -> Program:
    """The program of some of the outputs, which reads the outputs named in ``readable`` as arguments where it can.

    Only what is stored exactly as it is used can be read: an output of the arithmetic's own dtype, or of a value that is cast to
    the output's dtype. Arguments that nothing reads are dropped, unless the sizes of the domain come from them alone.
    """
    known = _readable_values(program, readable)
    builder = ProgramBuilder(program.rank, program.math, dict(program.axes))
    builder.arguments += [*program.arguments, *_as_arguments(program, readable)]
    kept = [output for output in program.outputs if output.name in outputs]
    renumbered = copy_values(program, builder, {value for o in kept for value, _ in o.stores}, known)
    for output in kept:
        stores = tuple((renumbered[value], lane) for value, lane in output.stores)
        builder.output(output.name, output.dtype, output.rows, output.columns, stores)
    return _with_arguments(builder, program)


def merged(first: Program, second: Program) -> Program | None:
    """One program with the outputs of both; arguments of one name are one argument. None where they do not fit.

    Values that both compute are computed once, which is what merging is for.
    """
    if (first.rank, first.math) != (second.rank, second.math):
        return None
    arguments = {a.name: a for a in first.arguments}
    axes = dict(first.axes)
    for argument in second.arguments:
        if arguments.setdefault(argument.name, argument) != argument:
            return None
    for axis, width in second.axes:
        if axes.setdefault(axis, width) != width:
            return None
    if {o.name for o in first.outputs} & {o.name for o in second.outputs}:
        return None
    builder = ProgramBuilder(first.rank, first.math, axes)
    builder.arguments += arguments.values()
    for program in (first, second):
        renumbered = copy_values(program, builder, {v for o in program.outputs for v, _ in o.stores}, {})
        for o in program.outputs:
            builder.output(o.name, o.dtype, o.rows, o.columns, tuple((renumbered[v], lane) for v, lane in o.stores))
    return replace(builder.build(), arguments=tuple(arguments.values()), axes=tuple(axes.items())).verify()


def _as_arguments(program: Program, names: Collection[str]) -> list[Argument]:
    return [Argument(o.name, o.dtype, o.rows, o.columns) for o in program.outputs if o.name in names]


def _readable_values(program: Program, names: Collection[str]) -> dict[int, tuple[str, Lane | None]]:
    values: dict[int, tuple[str, Lane | None]] = {}
    for output in program.outputs:
        if output.name not in names or output.sums_rows:
            continue
        for value, lane in output.stores:
            if _stored_exactly(program, value, output, lane):
                values.setdefault(value, (output.name, lane))
    return values


def _stored_exactly(program: Program, value: int, output: Output, lane: Lane | None) -> bool:
    node = program.nodes[value]
    if node.op in ("load", "const") or (lane is not None and program.extents[value].axis is None):
        return False
    return output.dtype == program.math or (node.op == "cast" and node.attributes == (output.dtype,))


def copy_values(program: Program, builder: ProgramBuilder, wanted: set[int],
                 known: Mapping[int, tuple[str, Lane | None]]) -> dict[int, int]:
    """Append the wanted values and what they need to the builder; values that are known are loaded."""
    needed = set(wanted)
    for value in reversed(range(len(program.nodes))):
        if value in needed and value not in known:
            needed.update(program.nodes[value].operands)
    renumbered: dict[int, int] = {}
    for value in sorted(needed):
        node = program.nodes[value]
        if value in known:
            renumbered[value] = builder.load(*known[value])
        else:
            renumbered[value] = append_node(builder, node, [renumbered[v] for v in node.operands])
    return renumbered


def _with_arguments(builder: ProgramBuilder, whole: Program) -> Program:
    """The built program with an unread argument put back where the sizes of the domain could not be told without it."""
    part = builder.build()
    kept = {argument.name for argument in part.arguments}

    def keep(known: bool, candidates: list[Argument]) -> None:
        if not known and candidates:
            kept.add(candidates[0].name)

    for d in range(whole.rank):
        varying = [a for a in builder.arguments if a.rows[d]]
        keep(any(a.name in kept for a in varying), varying)
    used_axes = {name for name, _ in part.axes} | {o.columns for o in part.outputs if isinstance(o.columns, str)}
    for axis, width in whole.axes:
        covering = [a for a in builder.arguments if a.columns == axis]
        keep(width is not None or axis not in used_axes or any(a.name in kept for a in covering), covering)
    keep(bool(kept), builder.arguments)
    arguments = tuple(a for a in builder.arguments if a.name in kept)
    used_axes |= {a.columns for a in arguments if isinstance(a.columns, str)}
    axes = tuple((name, width) for name, width in whole.axes if name in used_axes)
    return replace(part, arguments=arguments, axes=axes).verify()
