"""Parsing: the program that printed a text."""

from __future__ import annotations

from functools import lru_cache

from .parts import Argument, Lane, Node, Output, ProgramError
from .whole import Program


@lru_cache(maxsize=4096)
def parse(text: str) -> Program:
    """The program that printed this text."""
    rank, math = 0, "float32"
    axes: list[tuple[str, int | None]] = []
    arguments: list[Argument] = []
    nodes: list[Node] = []
    outputs: list[Output] = []
    for line in text.splitlines():
        head, _, rest = line.strip().partition(" ")
        if head == "program":
            settings = dict(word.split("=") for word in rest.split())
            rank, math = int(settings["rank"]), settings["math"]
        elif head == "axis":
            name, _, width = rest.split()
            axes.append((name, None if width == "?" else int(width)))
        elif head == "arg":
            name, _, shape = rest.split()
            arguments.append(Argument(name, *_parse_shape(shape)))
        elif head == "out":
            declaration, _, stores = rest.partition(" = ")
            name, _, shape = declaration.split()
            outputs.append(
                Output(name, *_parse_shape(shape), tuple(_parse_store(s) for s in stores.split(", ")))
            )
        elif head.startswith("%"):
            nodes.append(_parse_node(rest.removeprefix("= ").split()))
        elif head:
            raise ProgramError(f"not a line of a row program: {line!r}")
    return Program(rank, math, tuple(axes), tuple(arguments), tuple(nodes), tuple(outputs))


def _parse_shape(text: str) -> tuple[str, tuple[bool, ...], int | str | None]:
    dtype, _, inside = text.removesuffix("]").partition("[")
    rows, _, columns = inside.partition("|")
    flags = tuple(flag == "r" for flag in rows.split(",") if flag)
    return dtype, flags, None if not columns else int(columns) if columns.isdigit() else columns


def _parse_store(text: str) -> tuple[int, Lane | None]:
    value, _, lane = text.partition(" @ ")
    return int(value.strip()[1:]), _parse_lane(lane.split()) if lane else None


def _parse_lane(words: list[str]) -> Lane:
    return Lane(words[0], int(words[1]), int(words[2]))


def _parse_node(words: list[str]) -> Node:
    op = words[0]
    operands = tuple(int(word[1:]) for word in words if word.startswith("%"))
    plain = [word for word in words[1:] if not word.startswith("%")]
    if op == "load":
        return Node(op, (), (plain[0], None if plain[1] == "None" else _parse_lane(plain[1:])))
    if op == "const":
        return Node(op, (), (_parse_number(plain[0]),))
    return Node(op, operands, tuple(plain))


def _parse_number(text: str) -> float | int | bool:
    if text in ("True", "False"):
        return text == "True"
    try:
        return int(text)
    except ValueError:
        return float(text)
