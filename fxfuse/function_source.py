"""Where a function named on the command line comes from: a rule's name, or ``FILE.py:NAME``; and example operands."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxfuse.rules import load_patterns, operand_shapes


class UnknownFunction(ValueError):
    """The words given name no function; the message says what would."""


def function_of(target: str) -> Callable[..., Any]:
    """The plain function that ``target`` names. A file is run to find it."""
    rules = load_patterns()
    if target in rules:
        return rules[target].function
    file, colon, name = target.rpartition(":")
    path = Path(file).expanduser()
    if not colon or not path.is_file():
        raise UnknownFunction(f"{target!r} is no FILE.py:FUNCTION and no rule; rules are {', '.join(sorted(rules))}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UnknownFunction(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise UnknownFunction(f"{path} defines no function {name!r}")
    return function


def operands(function: Callable[..., Any], shapes: Sequence[str] = ()) -> list[Tensor]:
    """An example for each positional parameter: of the shapes given ("4x8"), else as annotated, else [2, 3, 8]."""
    usual = operand_shapes(function)
    if not shapes:
        return [shape.example() for shape in usual.values()]
    if len(shapes) != len(usual):
        raise UnknownFunction(f"give no shape, or one for each of {', '.join(usual)}: got {len(shapes)}")
    return [
        torch.zeros(_sizes(text), dtype=shape.dtype) for text, shape in zip(shapes, usual.values(), strict=True)
    ]


def _sizes(text: str) -> list[int]:
    if not re.fullmatch(r"\d+(x\d+)*", text):
        raise UnknownFunction(f"a shape is numbers joined by x, such as 4x8 or 8; got {text!r}")
    return [int(size) for size in text.split("x")]
