"""Readers of casts: ``.to`` in all its forms, ``.float()``, ``.type_as`` and their kin are ``CAST(x, dtype)``, or nothing.

A cast is part of a model's numerics, so none is merged with another or moved; one that changes no dtype is dropped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from .builder import Builder, Leave
from .facts import same_strides, tensor_of
from .vocabulary import CAST, spelling


def cast_to(b: Builder, input: Node, dtype: torch.dtype | None) -> Node:
    """``input`` in another dtype; the device stays."""
    source, expected = b.tensor(input), b.expected()
    if source.device != expected.device or expected.layout is not torch.strided:
        raise Leave("moves to another device or layout")
    if (dtype is not None and expected.dtype != dtype) or source.is_complex() != expected.is_complex():
        raise Leave("not a plain change of dtype")
    return input if source.dtype == expected.dtype else b.finish(CAST, input, expected.dtype)


@spelling("to", "_to_copy", search=False)
def to(b: Builder, input: Node, *where: Any, dtype: Any = None, device: Any = None, other: Any = None,
       non_blocking: bool = False, copy: bool = False, memory_format: Any = None, layout: Any = None,
       pin_memory: Any = None) -> Node:  # fmt: skip
    """The dtype and device that result are facts of the trace; only what ``.to`` can ask beyond them is looked at."""
    copies = copy or b.node.target is torch.ops.aten._to_copy.default
    if pin_memory:
        raise Leave("asks for pinned memory")
    if memory_format not in (None, torch.preserve_format):
        return _cast_and_laid_out(b, input, memory_format)
    if copies or any(flag is True for flag in where):
        return _copied(b, input)
    return cast_to(b, input, None)


def _cast_and_laid_out(b: Builder, input: Node, memory_format: torch.memory_format) -> Node:
    source, expected = b.tensor(input), b.expected()
    if source.device != expected.device or source.is_complex() != expected.is_complex():
        raise Leave("not a plain change of dtype")
    x = b.cast(input, expected.dtype)
    if same_strides(b.tensor(x), expected):
        return x
    return b.call(torch.ops.aten.clone.default, x, memory_format=memory_format)


def _copied(b: Builder, input: Node) -> Node:
    """A copy that also casts is a cast; one that does not is a copy."""
    if b.tensor(input).dtype == b.expected().dtype:
        raise Leave("a copy")
    return cast_to(b, input, None)


def _read_named(name: str, dtype: torch.dtype) -> None:
    @spelling(name, search=False)
    def read(b: Builder, input: Node, memory_format: Any = None) -> Node:
        if memory_format not in (None, torch.preserve_format):
            raise Leave("asks for a memory layout")
        return cast_to(b, input, dtype)


for _name, _dtype in {
    "float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64,
    "int": torch.int32, "long": torch.int64, "bool": torch.bool,
}.items():  # fmt: skip
    _read_named(_name, _dtype)


@spelling("type_as", search=False)
def type_as(b: Builder, input: Node, other: Node) -> Node:
    target = tensor_of(other)
    return cast_to(b, input, None if target is None else target.dtype)


@spelling("type", search=False)
def type_(b: Builder, input: Node, dtype: Any = None, non_blocking: bool = False) -> Node:
    if dtype is None:
        raise Leave("asks for the name of the type")
    return cast_to(b, input, None)


@spelling("convert_element_type", search=False, functions=(torch.ops.prims.convert_element_type.default,))
def convert_element_type(b: Builder, input: Node, dtype: torch.dtype) -> Node:
    return cast_to(b, input, dtype)
