"""Regions that look at the same logits, as one: a cross-entropy and the square of a logsumexp are two regions in a graph."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from torch import fx

from ..memory.restriction import merged
from ..program import Program
from ..regions import Region


def join_over(regions: Sequence[Region], logits: fx.Node) -> list[Region]:
    """The regions, those that read ``logits`` joined into the first of them where that is possible."""
    reading = [region for region in regions if any(view.node is logits for view in region.arguments)]
    others = [region for region in regions if region not in reading]
    joined: list[Region] = []
    for region in reading:
        union = _joined(joined[0], region) if joined else region
        joined = [union, *joined[1:]] if union is not None else [*joined, region]
    return [*joined, *others]


def _joined(first: Region, second: Region) -> Region | None:
    """Both as one region; None where their rows differ, or one needs what the other gives."""
    if _needs(first, second) or _needs(second, first):
        return None
    known = {view: argument.name for view, argument in zip(first.arguments, first.program.arguments, strict=True)}
    names = {argument.name: known.get(view, f"b{i}_{argument.name}")
             for i, (view, argument) in enumerate(zip(second.arguments, second.program.arguments, strict=True))}
    outputs = {output.name: f"{output.name}_b{len(first.outputs)}" for output in second.program.outputs}
    program = merged(first.program, _renamed(second.program, names, outputs))
    if program is None:
        return None
    views = dict(zip((a.name for a in first.program.arguments), first.arguments, strict=True))
    views |= {names[a.name]: view for a, view in zip(second.program.arguments, second.arguments, strict=True)}
    return replace(
        first,
        program=program,
        arguments=[views[a.name] for a in program.arguments],
        outputs=[*first.outputs, *(replace(v, names=tuple(outputs[name] for name in v.names)) for v in second.outputs)],
        nodes=[*first.nodes, *second.nodes],
    )


def _renamed(program: Program, names: dict[str, str], outputs: dict[str, str]) -> Program:
    load = lambda node: replace(node, attributes=(names[node.attributes[0]], *node.attributes[1:]))  # noqa: E731
    return replace(
        program,
        arguments=tuple(replace(a, name=names[a.name]) for a in program.arguments),
        nodes=tuple(load(node) if node.op == "load" else node for node in program.nodes),
        outputs=tuple(replace(o, name=outputs[o.name]) for o in program.outputs),
    )


def _needs(region: Region, other: Region) -> bool:
    """Does a region read what depends on another's outputs."""
    read = {view.node for view in region.arguments}
    return bool(read & _after([view.node for view in other.outputs]))


def _after(nodes: Collection[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += node.users
    return found
